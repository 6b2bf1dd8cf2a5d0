/* The core's functions on arrays, without a model. */
#include "binding.h"

PyObject *py_methods(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    PyObject *all = PyDict_New(), *parameters = PyDict_New(), *both = NULL;
    int failed = !all || !parameters;
    for (const skv_policy *p = skv_policies; !failed && p->name; p++) {
        const skv_method method = skv_method_of(p);
        failed = py_set(all, p->name,
                        Py_BuildValue("{s:s,s:s,s:I}", "summary", p->summary, "parameters", p->parameters, "needs",
                                      skv_method_needs(&method)));
    }
    for (const skv_parameter *p = skv_parameters; !failed && p->name; p++) {
        PyObject *value = p->kind == 'f' ? PyFloat_FromDouble(p->value) : PyLong_FromDouble(p->value);
        if (p->no_default) Py_SETREF(value, Py_NewRef(Py_None));
        failed = py_set(parameters, p->name,
                        Py_BuildValue("{s:C,s:d,s:d,s:N,s:s}", "kind", p->kind, "low", p->low, "high", p->high,
                                      "default", value, "summary", p->summary));
    }
    if (!failed) both = PyTuple_Pack(2, all, parameters);
    Py_XDECREF(all);
    Py_XDECREF(parameters);
    return both;
}

PyObject *py_method_needs(PyObject *module, PyObject *dict) {
    PyObject *held = NULL;
    skv_method method;
    py_custom custom = {0};
    if (py_method(module, dict, &method, &custom, &held)) return NULL;
    Py_XDECREF(held);
    return PyLong_FromUnsignedLong(skv_method_needs(&method));
}

PyObject *py_check_method(PyObject *module, PyObject *args) {
    PyObject *dict, *held = NULL, *result = NULL;
    int n_prompt, reserve = 0;
    skv_method method;
    skv_error error;
    py_custom custom = {0};
    if (!PyArg_ParseTuple(args, "Oi|i", &dict, &n_prompt, &reserve) || py_method(module, dict, &method, &custom, &held))
        return NULL;
    const npy_intp *shape = held ? PyArray_DIMS((PyArrayObject *)held) : NULL;
    const size_t n = shape ? (size_t)(shape[0] * shape[1]) : 0, n_kv = shape ? (size_t)shape[1] : 1;
    if (skv_method_check(&method, n, n_kv, &error) || skv_method_check_prompt(&method, n, n_prompt, reserve, &error))
        py_raise(module, &error);
    else
        result = Py_NewRef(Py_None);
    Py_XDECREF(held);
    return result;
}

/* The arrays that py_select borrows, and what it makes of them. */
typedef struct selection {
    PyArrayObject *keys, *queries, *positions, *penalties, *sums;
    PyObject *lists[5]; /* kept, importance, redundancy, penalty, score */
} selection;

static int append(PyObject *list, const void *data, int type, size_t n) {
    PyObject *array = py_copy(data, type, 1, (npy_intp[]){(npy_intp)n});
    const int failed = !array || PyList_Append(list, array);
    Py_XDECREF(array);
    return failed;
}

/* Appends to the lists what every head keeps. */
static int list_selections(selection *a, const skv_selection *found, size_t n_heads, bool compacts) {
    const skv_term terms[] = {SKV_IMPORTANCE, SKV_REDUNDANCY, SKV_PENALTY};
    for (const skv_selection *f = found; f < found + n_heads; f++) {
        if (append(a->lists[0], f->kept, NPY_INT32, f->n_kept)) return -1;
        for (size_t i = 0; i < 3; i++)
            if (f->given & 1u << terms[i] && append(a->lists[i + 1], f->terms[terms[i]], NPY_FLOAT, f->n_candidates))
                return -1;
        if (compacts && append(a->lists[4], f->score, NPY_FLOAT, f->n_candidates)) return -1;
    }
    return 0;
}

static int select_heads(PyObject *module, const skv_method *method, py_custom *custom, selection *a, skv_slots *slots) {
    const bool compacts = method->policy->flags & SKV_COMPACTS;
    const size_t n = slots->n_slots, n_heads = slots->n_kv_heads;
    skv_error error;
    skv_status status = SKV_OK;
    int failed = -1;
    skv_selection *found = PyMem_Calloc(n_heads, sizeof *found);
    float *block = PyMem_Calloc(n_heads * n, (SKV_N_TERMS + 2) * sizeof *block), *at = block;
    if (!found || !block) {
        PyErr_NoMemory();
        goto cleanup;
    }
    for (size_t h = 0; h < n_heads; h++) {
        found[h].kept = (int32_t *)(void *)at, found[h].score = at + n, at += 2 * n;
        for (size_t term = 0; term < SKV_N_TERMS; term++, at += n) found[h].terms[term] = at;
        found[h].n_kept = n;
        for (size_t i = 0; i < n; i++) found[h].kept[i] = (int32_t)i;
    }
    if (compacts) status = skv_select(method, slots, found, &error);
    if (status == SKV_CALLER && custom->type)
        PyErr_Restore(custom->type, custom->value, custom->traceback);
    else if (status)
        py_raise(module, &error);
    else
        failed = list_selections(a, found, n_heads, compacts);
cleanup:
    PyMem_Free(found);
    PyMem_Free(block);
    return failed;
}

/* Whether the budgets are those of one layer with this many heads. */
static bool has_budgets(PyObject *module, PyObject *budgets, npy_intp n_kv) {
    const npy_intp *shape = PyArray_DIMS((PyArrayObject *)budgets);
    if (shape[0] == 1 && shape[1] == n_kv) return true;
    py_config_error(module, "budget: expected shape [1, %zd], found [%zd, %zd]", (Py_ssize_t)n_kv, (Py_ssize_t)shape[0],
                    (Py_ssize_t)shape[1]);
    return false;
}

PyObject *py_select(PyObject *module, PyObject *args, PyObject *kwargs) {
    PyObject *dict, *keys, *queries, *positions, *penalties = Py_None, *sums = Py_None, *held = NULL, *result = NULL;
    int prompt = 0, layer = 0;
    long long prompt_index = 0, sample_index = 0;
    char *names[] = {"method", "keys",   "queries",  "positions", "penalties",
                     "sums",   "prompt", "sequence", "layer",     NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OOi(LL)i", names, &dict, &keys, &queries, &positions,
                                     &penalties, &sums, &prompt, &prompt_index, &sample_index, &layer))
        return NULL;
    skv_method method;
    skv_error error;
    py_custom custom = {0};
    selection a = {0};
    if (py_method(module, dict, &method, &custom, &held)) return NULL;
    if (!(a.keys = py_array(module, keys, "keys", NPY_FLOAT, 3, (npy_intp[]){-1, -1, -1}))) goto cleanup;
    const npy_intp n_kv = PyArray_DIM(a.keys, 0), n_slots = PyArray_DIM(a.keys, 1), dim = PyArray_DIM(a.keys, 2);
    if (!(a.queries = py_array(module, queries, "queries", NPY_FLOAT, 3, (npy_intp[]){-1, -1, dim}))) goto cleanup;
    if (n_kv < 1 || n_slots < 1 || dim < 1 || dim > SKV_MAX_HEAD_DIM || PyArray_DIM(a.queries, 0) < 1 ||
        PyArray_DIM(a.queries, 0) % n_kv || PyArray_DIM(a.queries, 1) < 1) {
        py_config_error(module,
                        "keys [%zd, %zd, %zd] and queries [%zd, %zd, %zd]: none may be empty, head_dim at most %d, "
                        "query heads a multiple of KV heads",
                        (Py_ssize_t)n_kv, (Py_ssize_t)n_slots, (Py_ssize_t)dim, (Py_ssize_t)PyArray_DIM(a.queries, 0),
                        (Py_ssize_t)PyArray_DIM(a.queries, 1), (Py_ssize_t)PyArray_DIM(a.queries, 2), SKV_MAX_HEAD_DIM);
        goto cleanup;
    }
    if (!(a.positions = py_array(module, positions, "positions", NPY_INT32, 2, (npy_intp[]){n_kv, n_slots})))
        goto cleanup;
    if (penalties != Py_None &&
        !(a.penalties = py_array(module, penalties, "penalties", NPY_FLOAT, 2, (npy_intp[]){-1, 3})))
        goto cleanup;
    if (sums != Py_None && !(a.sums = py_array(module, sums, "sums", NPY_FLOAT, 2, (npy_intp[]){n_kv, n_slots})))
        goto cleanup;
    if ((skv_method_needs(&method) & 1u << SKV_SUMS) && !a.sums) {
        py_config_error(module, "%s needs sums, the attention received by every slot", method.policy->name);
        goto cleanup;
    }
    if (held && !has_budgets(module, held, n_kv)) goto cleanup;
    if (skv_method_check(&method, held ? (size_t)n_kv : 0, (size_t)n_kv, &error) ||
        skv_method_check_prompt(&method, held ? (size_t)n_kv : 0, prompt, 0, &error)) {
        py_raise(module, &error);
        goto cleanup;
    }
    for (size_t i = 0; i < 5; i++)
        if (!(a.lists[i] = PyList_New(0))) goto cleanup;
    skv_slots slots = {.n_kv_heads = (size_t)n_kv,
                       .n_heads = (size_t)PyArray_DIM(a.queries, 0),
                       .n_slots = (size_t)n_slots,
                       .n_queries = (size_t)PyArray_DIM(a.queries, 1),
                       .head_dim = (size_t)dim,
                       .n_penalties = a.penalties ? (size_t)PyArray_DIM(a.penalties, 0) : 0,
                       .keys = PyArray_DATA(a.keys),
                       .queries = PyArray_DATA(a.queries),
                       .positions = PyArray_DATA(a.positions),
                       .sums = a.sums ? PyArray_DATA(a.sums) : NULL,
                       .penalties = a.penalties ? PyArray_DATA(a.penalties) : NULL,
                       .n_prompt = prompt,
                       .layer = layer,
                       .sequence = {prompt_index, sample_index}};
    if (!select_heads(module, &method, &custom, &a, &slots))
        result = PyTuple_Pack(5, a.lists[0], a.lists[1], a.lists[2], a.lists[3], a.lists[4]);
cleanup:
    Py_XDECREF(a.keys);
    Py_XDECREF(a.queries);
    Py_XDECREF(a.positions);
    Py_XDECREF(a.penalties);
    Py_XDECREF(a.sums);
    Py_XDECREF(held);
    for (size_t i = 0; i < 5; i++) Py_XDECREF(a.lists[i]);
    return result;
}

PyObject *py_segment(PyObject *module, PyObject *args) {
    PyObject *ids_object, *tuple, *held = NULL, *result = NULL;
    int n_prompt;
    unsigned compat, vocab;
    if (!PyArg_ParseTuple(args, "OOIiI", &ids_object, &tuple, &vocab, &n_prompt, &compat)) return NULL;
    skv_vocabulary vocabulary;
    skv_error error;
    skv_sentence *sentences = NULL;
    PyArrayObject *ids = py_array(module, ids_object, "ids", NPY_INT32, 1, (npy_intp[]){-1});
    PyArrayObject *spans = NULL, *labels = NULL, *closed = NULL;
    if (!ids || py_vocabulary(module, tuple, &vocabulary, vocab, &held)) goto cleanup;
    const npy_intp n = PyArray_SIZE(ids);
    const int32_t *id = PyArray_DATA(ids);
    for (npy_intp i = 0; i < n; i++)
        if (id[i] < 0 || (unsigned)id[i] >= vocab) {
            py_config_error(module, "ids[%zd] is %d; allowed: 0 to %u", (Py_ssize_t)i, (int)id[i], vocab - 1);
            goto cleanup;
        }
    size_t found = 0;
    if (!(sentences = PyMem_Calloc((size_t)n + 1, sizeof *sentences))) {
        PyErr_NoMemory();
        goto cleanup;
    }
    if (skv_segment(&vocabulary, compat, id, (size_t)n, n_prompt, sentences, &found, &error)) {
        py_raise(module, &error);
        goto cleanup;
    }
    const npy_intp m = (npy_intp)found;
    spans = (PyArrayObject *)PyArray_SimpleNew(2, ((npy_intp[]){m, 2}), NPY_INT32);
    labels = (PyArrayObject *)PyArray_SimpleNew(1, &m, NPY_INT32);
    closed = (PyArrayObject *)PyArray_SimpleNew(1, &m, NPY_INT32);
    if (!spans || !labels || !closed) goto cleanup;
    for (npy_intp i = 0; i < m; i++) {
        *(int32_t *)PyArray_GETPTR2(spans, i, 0) = sentences[i].first;
        *(int32_t *)PyArray_GETPTR2(spans, i, 1) = sentences[i].last;
        *(int32_t *)PyArray_GETPTR1(labels, i) = sentences[i].thought;
        *(int32_t *)PyArray_GETPTR1(closed, i) = sentences[i].closed;
    }
    result = PyTuple_Pack(3, spans, labels, closed);
cleanup:
    PyMem_Free(sentences);
    Py_XDECREF(ids);
    Py_XDECREF(held);
    Py_XDECREF(spans);
    Py_XDECREF(labels);
    Py_XDECREF(closed);
    return result;
}

PyObject *py_flag_repeats(PyObject *module, PyObject *args) {
    PyObject *object;
    double tau;
    unsigned compat;
    skv_error error;
    if (!PyArg_ParseTuple(args, "OdI", &object, &tau, &compat)) return NULL;
    PyArrayObject *vectors = py_array(module, object, "vectors", NPY_FLOAT, 2, (npy_intp[]){-1, -1});
    if (!vectors) return NULL;
    const npy_intp n = PyArray_DIM(vectors, 0), width = PyArray_DIM(vectors, 1);
    PyObject *lambda = PyArray_SimpleNew(1, &n, NPY_FLOAT);
    if (lambda && skv_flag_repeats(PyArray_DATA(vectors), (size_t)n, (size_t)width, (float)tau, compat,
                                   PyArray_DATA((PyArrayObject *)lambda), &error)) {
        py_raise(module, &error);
        Py_CLEAR(lambda);
    }
    Py_DECREF(vectors);
    return lambda;
}
