/* The core's functions on arrays, without a model. */
#include "binding.h"

#include "../evict.h"

PyObject *py_methods(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    PyObject *all = PyDict_New(), *parameters = PyDict_New(), *both = NULL;
    for (const skv_policy *const *p = skv_policies; all && *p; p++) {
        PyObject *row = Py_BuildValue("{s:s,s:s,s:I}", "summary", (*p)->summary, "parameters", (*p)->parameters, "needs", (*p)->needs);
        if (!row || PyDict_SetItemString(all, (*p)->name, row)) Py_CLEAR(all);
        Py_XDECREF(row);
    }
    for (const skv_parameter *p = skv_parameters; parameters && p->name; p++) {
        PyObject *value = p->no_default ? Py_NewRef(Py_None) : p->kind == 'f' ? PyFloat_FromDouble(p->value) : PyLong_FromDouble(p->value);
        PyObject *row = Py_BuildValue("{s:C,s:d,s:d,s:N,s:s}", "kind", p->kind, "low", p->low, "high", p->high, "default", value, "summary",
                                      p->summary);
        if (!row || PyDict_SetItemString(parameters, p->name, row)) Py_CLEAR(parameters);
        Py_XDECREF(row);
    }
    if (all && parameters) both = PyTuple_Pack(2, all, parameters);
    Py_XDECREF(all);
    Py_XDECREF(parameters);
    return both;
}

PyObject *py_check_method(PyObject *module, PyObject *args) {
    PyObject *dict, *held = NULL, *result = NULL;
    int n_prompt, reserve = 0;
    skv_method method;
    skv_error error;
    py_custom custom = {0};
    if (!PyArg_ParseTuple(args, "Oi|i", &dict, &n_prompt, &reserve) || py_method(module, dict, &method, &custom, &held)) return NULL;
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
    skv_penalty *flagged;
    float *block;
    int32_t *keep;
    PyObject *lists[5]; /* kept, importance, redundancy, penalty, score */
} selection;

static int append(PyObject *list, PyObject *array) {
    const int failed = !array || PyList_Append(list, array);
    Py_XDECREF(array);
    return failed;
}

static int select_heads(PyObject *module, const skv_method *method, py_custom *custom, selection *a, int prompt, const int64_t *sequence,
                        int layer) {
    const skv_backend *backend;
    skv_error error;
    if (skv_backend_find(NULL, &backend, &error)) return py_raise(module, &error), -1;
    const size_t n_kv = (size_t)PyArray_DIM(a->keys, 0), n_slots = (size_t)PyArray_DIM(a->keys, 1), dim = (size_t)PyArray_DIM(a->keys, 2);
    const size_t stride = (dim + 15) / 16 * 16, row = (n_slots + 47) / 16 * 16, window = (size_t)method->window;
    const size_t group = (size_t)PyArray_DIM(a->queries, 0) / n_kv, given = (size_t)PyArray_DIM(a->queries, 1),
                 n_queries = given < window ? given : window;
    skv_heap heap = {0};
    const size_t n_penalties = a->penalties ? (size_t)PyArray_DIM(a->penalties, 0) : 0, needs = skv_method_needs(method);
    float *block = a->block = skv_alloc(
        &heap, n_slots * stride + window * group * stride + 6 * row + backend->score_work(n_slots, stride, window), sizeof *block);
    a->flagged = skv_alloc(&heap, n_penalties, sizeof *a->flagged);
    a->keep = skv_alloc(&heap, n_slots, sizeof *a->keep);
    if (!block || !a->flagged || !a->keep) return PyErr_NoMemory(), -1;
    for (size_t i = 0; i < n_penalties; i++) {
        const float *from = (const float *)PyArray_GETPTR2(a->penalties, (npy_intp)i, 0);
        a->flagged[i] = (skv_penalty){(int32_t)from[0], (int32_t)from[1], from[2]};
    }
    float *keys = block, *queries = keys + n_slots * stride, *arrays = queries + window * group * stride;
    skv_scoring s = {.backend = backend,
                     .method = method,
                     .layer = (size_t)layer,
                     .n_kv_heads = n_kv,
                     .group = group,
                     .n_slots = n_slots,
                     .dim = dim,
                     .stride = stride,
                     .keys = keys,
                     .queries = queries,
                     .n_queries = n_queries,
                     .penalties = a->flagged,
                     .n_penalties = n_penalties,
                     .sequence = sequence,
                     .importance = arrays,
                     .redundancy = arrays + row,
                     .penalty = arrays + 2 * row,
                     .score = arrays + 3 * row,
                     .work = arrays + 6 * row};
    for (size_t h = 0; h < n_kv; h++) {
        const size_t newest = method->policy->newest ? (size_t)method->policy->newest(method, method->budgets ? method->budgets[h] : 1) : 0;
        s.head = h;
        s.n_candidates = n_slots > newest ? n_slots - newest : 0;
        s.positions = (const int32_t *)PyArray_GETPTR2(a->positions, (npy_intp)h, 0);
        s.sums = a->sums ? (const float *)PyArray_GETPTR2(a->sums, (npy_intp)h, 0) : NULL;
        for (size_t i = 0; i < n_slots; i++)
            memcpy(keys + i * stride, PyArray_GETPTR3(a->keys, (npy_intp)h, (npy_intp)i, 0), dim * sizeof *keys);
        for (size_t q = 0; q < n_queries; q++)
            for (size_t g = 0; g < group; g++)
                memcpy(queries + (q * group + g) * stride,
                       PyArray_GETPTR3(a->queries, (npy_intp)(h * group + g), (npy_intp)(given - n_queries + q), 0), dim * sizeof *queries);
        size_t kept = n_slots;
        if (needs & SKV_COMPACTS) {
            if (!method->policy->score(&s)) return PyErr_Restore(custom->type, custom->value, custom->traceback), -1;
            if ((needs & SKV_SHARED) && h + 1 < n_kv) continue;
            kept = skv_select(s.score, s.positions, n_slots, newest, skv_method_protected(method, prompt), (size_t)method->budgets[h],
                              method->compat & SKV_COMPAT_SCORE_ORDER, arrays + 4 * row, a->keep);
        } else {
            for (size_t i = 0; i < n_slots; i++) a->keep[i] = (int32_t)i;
        }
        const float *const found[] = {s.importance, s.redundancy, s.penalty, s.score};
        const size_t bits[] = {SKV_GIVES_IMPORTANCE, SKV_GIVES_REDUNDANCY, SKV_NEEDS_SENTENCES, SKV_COMPACTS};
        for (size_t shared = needs & SKV_SHARED ? 0 : h; shared <= h; shared++) {
            if (append(a->lists[0], py_copy(a->keep, NPY_INT32, 1, (npy_intp[]){(npy_intp)kept}))) return -1;
            for (size_t i = 0; i < 4; i++)
                if ((needs & bits[i]) && append(a->lists[i + 1], py_copy(found[i], NPY_FLOAT, 1, (npy_intp[]){(npy_intp)s.n_candidates})))
                    return -1;
        }
    }
    return 0;
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
    char *names[] = {"method", "keys", "queries", "positions", "penalties", "sums", "prompt", "sequence", "layer", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OOi(LL)i", names, &dict, &keys, &queries, &positions, &penalties, &sums, &prompt,
                                     &prompt_index, &sample_index, &layer))
        return NULL;
    skv_method method;
    skv_error error;
    py_custom custom = {0};
    selection a = {0};
    if (py_method(module, dict, &method, &custom, &held)) return NULL;
    if (!(a.keys = py_array(module, keys, "keys", NPY_FLOAT, 3, (npy_intp[]){-1, -1, -1}))) goto cleanup;
    const npy_intp n_kv = PyArray_DIM(a.keys, 0), n_slots = PyArray_DIM(a.keys, 1), dim = PyArray_DIM(a.keys, 2);
    if (!(a.queries = py_array(module, queries, "queries", NPY_FLOAT, 3, (npy_intp[]){-1, -1, dim}))) goto cleanup;
    if (n_kv < 1 || n_slots < 1 || dim < 1 || dim > 512 || PyArray_DIM(a.queries, 0) < 1 || PyArray_DIM(a.queries, 0) % n_kv ||
        PyArray_DIM(a.queries, 1) < 1) {
        py_config_error(
            module,
            "keys [%zd, %zd, %zd] and queries [%zd, %zd, %zd]: none may be empty, head_dim at most 512, query heads a multiple of KV heads",
            (Py_ssize_t)n_kv, (Py_ssize_t)n_slots, (Py_ssize_t)dim, (Py_ssize_t)PyArray_DIM(a.queries, 0),
            (Py_ssize_t)PyArray_DIM(a.queries, 1), (Py_ssize_t)PyArray_DIM(a.queries, 2));
        goto cleanup;
    }
    if (!(a.positions = py_array(module, positions, "positions", NPY_INT32, 2, (npy_intp[]){n_kv, n_slots}))) goto cleanup;
    if (penalties != Py_None && !(a.penalties = py_array(module, penalties, "penalties", NPY_FLOAT, 2, (npy_intp[]){-1, 3}))) goto cleanup;
    if (sums != Py_None && !(a.sums = py_array(module, sums, "sums", NPY_FLOAT, 2, (npy_intp[]){n_kv, n_slots}))) goto cleanup;
    if ((skv_method_needs(&method) & SKV_NEEDS_SUMS) && !a.sums) {
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
    const int64_t sequence[] = {prompt_index, sample_index};
    if (!select_heads(module, &method, &custom, &a, prompt, sequence, layer))
        result = PyTuple_Pack(5, a.lists[0], a.lists[1], a.lists[2], a.lists[3], a.lists[4]);
cleanup:;
    skv_heap heap = {.live_bytes = SIZE_MAX / 2}; /* only counts */
    skv_free(&heap, a.block);
    skv_free(&heap, a.flagged);
    skv_free(&heap, a.keep);
    PyObject *const owned[] = {(PyObject *)a.keys,
                               (PyObject *)a.queries,
                               (PyObject *)a.positions,
                               (PyObject *)a.penalties,
                               (PyObject *)a.sums,
                               held,
                               a.lists[0],
                               a.lists[1],
                               a.lists[2],
                               a.lists[3],
                               a.lists[4]};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) Py_XDECREF(owned[i]);
    return result;
}

PyObject *py_segment(PyObject *module, PyObject *args) {
    PyObject *ids_object, *tuple, *held = NULL, *result = NULL;
    int n_prompt;
    unsigned compat, vocab;
    if (!PyArg_ParseTuple(args, "OOIiI", &ids_object, &tuple, &vocab, &n_prompt, &compat)) return NULL;
    skv_vocabulary vocabulary;
    skv_tracker tracker = {0};
    skv_heap heap = {0};
    PyArrayObject *ids = py_array(module, ids_object, "ids", NPY_INT32, 1, (npy_intp[]){-1}), *spans = NULL, *labels = NULL, *closed = NULL;
    if (!ids || py_vocabulary(module, tuple, &vocabulary, vocab, &held)) goto cleanup;
    const npy_intp n = PyArray_SIZE(ids);
    const int32_t *id = PyArray_DATA(ids);
    for (npy_intp i = 0; i < n; i++)
        if (id[i] < 0 || (unsigned)id[i] >= vocab) {
            py_config_error(module, "ids[%zd] is %d; allowed: 0 to %u", (Py_ssize_t)i, (int)id[i], vocab - 1);
            goto cleanup;
        }
    if (!skv_tracker_init(&tracker, &heap, &vocabulary, compat, 1, n_prompt) || !skv_tracker_reserve(&tracker, (size_t)n)) {
        PyErr_NoMemory();
        goto cleanup;
    }
    bool inside;
    for (npy_intp i = 0; i < n; i++) skv_tracker_read(&tracker, id[i], &inside);
    const npy_intp m = (npy_intp)tracker.n_sentences;
    spans = (PyArrayObject *)PyArray_SimpleNew(2, ((npy_intp[]){m, 2}), NPY_INT32);
    labels = (PyArrayObject *)PyArray_SimpleNew(1, &m, NPY_INT32);
    closed = (PyArrayObject *)PyArray_SimpleNew(1, &m, NPY_INT32);
    if (!spans || !labels || !closed) goto cleanup;
    for (npy_intp i = 0; i < m; i++) {
        const skv_sentence *s = tracker.sentences + i;
        *(int32_t *)PyArray_GETPTR2(spans, i, 0) = s->first;
        *(int32_t *)PyArray_GETPTR2(spans, i, 1) = s->last;
        *(int32_t *)PyArray_GETPTR1(labels, i) = s->thought;
        *(int32_t *)PyArray_GETPTR1(closed, i) = s->closed;
    }
    result = PyTuple_Pack(3, spans, labels, closed);
cleanup:
    skv_tracker_free(&tracker);
    Py_XDECREF(ids);
    Py_XDECREF(held);
    Py_XDECREF(spans);
    Py_XDECREF(labels);
    Py_XDECREF(closed);
    return result;
}

PyObject *py_flag_repeats(PyObject *module, PyObject *args) {
    PyObject *object, *result = NULL;
    double tau;
    unsigned compat;
    if (!PyArg_ParseTuple(args, "OdI", &object, &tau, &compat)) return NULL;
    PyArrayObject *vectors = py_array(module, object, "vectors", NPY_FLOAT, 2, (npy_intp[]){-1, -1});
    if (!vectors) return NULL;
    const npy_intp n = PyArray_DIM(vectors, 0), width = PyArray_DIM(vectors, 1);
    const skv_backend *backend;
    skv_error error;
    skv_heap heap = {0};
    static const uint8_t flags[1] = {SKV_DELIMITER};
    const skv_vocabulary vocabulary = {.flags = flags};
    skv_tracker t = {0};
    if (skv_backend_find(NULL, &backend, &error)) {
        py_raise(module, &error);
        goto cleanup;
    }
    /* Every vector is a sentence of one token. */
    if (!skv_tracker_init(&t, &heap, &vocabulary, compat | SKV_COMPAT_EMPTY_SENTENCES, (size_t)width, 0) ||
        !skv_tracker_reserve(&t, (size_t)n)) {
        PyErr_NoMemory();
        goto cleanup;
    }
    for (npy_intp i = 0; i < n; i++) {
        bool inside;
        const skv_mark mark = skv_tracker_read(&t, 0, &inside);
        skv_tracker_add(&t, mark, (const float *)PyArray_GETPTR2(vectors, i, 0), (size_t)width);
    }
    skv_tracker_compare(&t, backend, (float)tau);
    result = PyArray_SimpleNew(1, &n, NPY_FLOAT);
    for (npy_intp i = 0; result && i < n; i++) *(float *)PyArray_GETPTR1((PyArrayObject *)result, i) = t.sentences[i].lambda;
cleanup:
    skv_tracker_free(&t);
    Py_DECREF(vectors);
    return result;
}
