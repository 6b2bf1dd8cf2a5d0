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
    Py_XDECREF(custom.function);
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
    Py_XDECREF(custom.function);
    return result;
}

/* (kept [n_kv_heads, L], (importance, redundancy, penalty, score) each [n_kv_heads, L] or None, counts [n_kv_heads,
 * 2]): the first counts[h, 0] of kept and the first counts[h, 1] of the others are a head's. */
static PyObject *select_heads(PyObject *module, const skv_method *method, py_custom *custom, const skv_slots *slots) {
    const skv_term terms[] = {SKV_IMPORTANCE, SKV_REDUNDANCY, SKV_PENALTY};
    const unsigned given = skv_method_gives(method);
    const bool compacts = method->policy->flags & SKV_COMPACTS;
    const npy_intp n = (npy_intp)slots->n_slots, n_heads = (npy_intp)slots->n_kv_heads, shape[] = {n_heads, n};
    PyArrayObject *kept = (PyArrayObject *)PyArray_ZEROS(2, shape, NPY_INT32, 0), *scores[4] = {NULL};
    PyArrayObject *counts = (PyArrayObject *)PyArray_ZEROS(2, ((npy_intp[]){n_heads, 2}), NPY_INT32, 0);
    skv_selection *found = PyMem_Calloc((size_t)n_heads, sizeof *found);
    PyObject *result = NULL;
    skv_error error;
    for (size_t i = 0; i < 4; i++)
        if (!(scores[i] = (PyArrayObject *)PyArray_ZEROS(2, shape, NPY_FLOAT, 0))) goto cleanup;
    if (!kept || !counts || !found) {
        PyErr_NoMemory();
        goto cleanup;
    }
    for (npy_intp h = 0; h < n_heads; h++) {
        found[h].kept = PyArray_GETPTR2(kept, h, 0);
        found[h].score = PyArray_GETPTR2(scores[3], h, 0);
        for (size_t i = 0; i < 3; i++) found[h].terms[terms[i]] = PyArray_GETPTR2(scores[i], h, 0);
        found[h].n_kept = (size_t)n; /* `full` keeps all */
        for (npy_intp i = 0; i < n; i++) found[h].kept[i] = (int32_t)i;
    }
    const skv_status status = compacts ? skv_select(method, slots, found, &error) : SKV_OK;
    if (status == SKV_CALLER && custom->type) {
        PyErr_Restore(custom->type, custom->value, custom->traceback);
    } else if (status) {
        py_raise(module, &error);
    } else {
        for (npy_intp h = 0; h < n_heads; h++) {
            *(int32_t *)PyArray_GETPTR2(counts, h, 0) = (int32_t)found[h].n_kept;
            *(int32_t *)PyArray_GETPTR2(counts, h, 1) = (int32_t)found[h].n_candidates;
        }
        PyObject *shown[4];
        for (size_t i = 0; i < 4; i++)
            shown[i] = (i < 3 ? (given & 1u << terms[i]) != 0 : compacts) ? (PyObject *)scores[i] : Py_None;
        result = Py_BuildValue("O(OOOO)O", kept, shown[0], shown[1], shown[2], shown[3], counts);
    }
cleanup:
    PyMem_Free(found);
    Py_XDECREF(kept);
    Py_XDECREF(counts);
    for (size_t i = 0; i < 4; i++) Py_XDECREF(scores[i]);
    return result;
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
    struct {
        PyArrayObject *keys, *queries, *positions, *penalties, *sums;
    } a = {0};
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
    const skv_slots slots = {.n_kv_heads = (size_t)n_kv,
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
    result = select_heads(module, &method, &custom, &slots);
cleanup:
    Py_XDECREF(a.keys);
    Py_XDECREF(a.queries);
    Py_XDECREF(a.positions);
    Py_XDECREF(a.penalties);
    Py_XDECREF(a.sums);
    Py_XDECREF(held);
    Py_XDECREF(custom.function);
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
    PyArrayObject *spans = NULL, *labels = NULL, *closed = NULL, *inside = NULL;
    if (!ids || py_vocabulary(module, tuple, &vocabulary, vocab, &held)) goto cleanup;
    const npy_intp n = PyArray_SIZE(ids);
    const int32_t *id = PyArray_DATA(ids);
    for (npy_intp i = 0; i < n; i++)
        if (id[i] < 0 || (unsigned)id[i] >= vocab) {
            py_config_error(module, "ids[%zd] is %d; allowed: 0 to %u", (Py_ssize_t)i, (int)id[i], vocab - 1);
            goto cleanup;
        }
    size_t found = 0;
    if (!(inside = (PyArrayObject *)PyArray_SimpleNew(1, &n, NPY_BOOL))) goto cleanup;
    if (!(sentences = PyMem_Calloc((size_t)n + 1, sizeof *sentences))) {
        PyErr_NoMemory();
        goto cleanup;
    }
    if (skv_segment(&vocabulary, compat, id, (size_t)n, n_prompt, sentences, &found, PyArray_DATA(inside), &error)) {
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
    result = PyTuple_Pack(4, spans, labels, closed, inside);
cleanup:
    PyMem_Free(sentences);
    Py_XDECREF(ids);
    Py_XDECREF(held);
    Py_XDECREF(spans);
    Py_XDECREF(labels);
    Py_XDECREF(closed);
    Py_XDECREF(inside);
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
