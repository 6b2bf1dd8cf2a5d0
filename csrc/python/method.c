/* Methods and vocabularies as Python gives them, and the call of a custom score. */
#include "binding.h"

#include <math.h>

/* dict[key] borrowed, NULL where it is absent or None, and once there is an exception. */
static PyObject *item(PyObject *dict, const char *key) {
    PyObject *name = dict && !PyErr_Occurred() ? PyUnicode_FromString(key) : NULL;
    PyObject *value = name ? PyDict_GetItemWithError(dict, name) : NULL;
    Py_XDECREF(name);
    return value == Py_None ? NULL : value;
}

static PyObject *floats(const float *data, size_t n) { return py_copy(data, NPY_FLOAT, 1, (npy_intp[]){(npy_intp)n}); }

/* keys [L, dim], positions [L] and what was asked for. */
static PyObject *candidates(const skv_candidates *c) {
    static const char *const names[SKV_N_TERMS] = {[SKV_SUMS] = "sums",
                                                   [SKV_PENALTY] = "penalties",
                                                   [SKV_IMPORTANCE] = "importance",
                                                   [SKV_REDUNDANCY] = "redundancy"};
    const npy_intp n = (npy_intp)c->n_slots, dim = (npy_intp)c->head_dim;
    const npy_intp queries[] = {(npy_intp)c->group, (npy_intp)c->n_queries, dim};
    PyObject *dict = PyDict_New();
    int failed = !dict || py_set(dict, "keys", py_copy(c->keys, NPY_FLOAT, 2, (npy_intp[]){n, dim})) ||
                 py_set(dict, "positions", py_copy(c->positions, NPY_INT32, 1, &n)) ||
                 py_set(dict, "n_candidates", PyLong_FromSize_t(c->n_candidates)) ||
                 py_set(dict, "layer", PyLong_FromSize_t(c->layer)) ||
                 py_set(dict, "head", PyLong_FromSize_t(c->head)) ||
                 (c->queries && py_set(dict, "queries", py_copy(c->queries, NPY_FLOAT, 3, queries)));
    for (size_t term = 0; term < SKV_N_TERMS && !failed; term++) {
        if (!c->terms[term] || !names[term]) continue;
        failed =
            py_set(dict, names[term], floats(c->terms[term], term == SKV_IMPORTANCE ? c->n_candidates : c->n_slots));
    }
    if (failed) Py_CLEAR(dict);
    return dict;
}

static bool call_custom(void *context, const skv_candidates *c, float *to) {
    py_custom *custom = context;
    const PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *dict = candidates(c), *result = NULL;
    PyArrayObject *score = NULL;
    const npy_intp n = (npy_intp)c->n_candidates;
    if (dict) result = PyObject_CallOneArg(custom->function, dict);
    if (result) score = py_array(custom->module, result, "custom score", NPY_FLOAT, 1, &n);
    for (npy_intp j = 0; score && j < n; j++) {
        to[j] = *(float *)PyArray_GETPTR1(score, j);
        if (!isnan(to[j])) continue;
        py_config_error(custom->module, "custom score of candidate %zd (layer %zu, head %zu) is nan; allowed: numbers",
                        (Py_ssize_t)j, c->layer, c->head);
        break;
    }
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_StopIteration)) { /* which no generator lets through */
        PyErr_Clear();
        py_config_error(custom->module, "custom score raised StopIteration; allowed: any other exception");
    }
    const bool ok = !PyErr_Occurred();
    if (!ok && custom->type)
        PyErr_Clear(); /* another row failed in the same forward: the first failure is told */
    else if (!ok)
        PyErr_Fetch(&custom->type, &custom->value, &custom->traceback);
    Py_XDECREF(score);
    Py_XDECREF(result);
    Py_XDECREF(dict);
    PyGILState_Release(gil);
    return ok;
}

PyObject *py_needs(void) {
    PyObject *needs = PyDict_New();
    const struct {
        const char *name;
        unsigned bit;
    } flags[] = {{"queries", SKV_QUERIES}, {"shared", SKV_SHARED}, {"custom", SKV_CUSTOM}, {"compacts", SKV_COMPACTS}};
    int failed = !needs;
    for (unsigned term = 0; term < SKV_N_TERMS && !failed; term++)
        failed = py_set(needs, skv_term_names[term], PyLong_FromUnsignedLong(1u << term));
    for (size_t i = 0; i < sizeof flags / sizeof *flags && !failed; i++)
        failed = py_set(needs, flags[i].name, PyLong_FromUnsignedLong(flags[i].bit));
    if (failed) Py_CLEAR(needs);
    return needs;
}

/* The parameters of the policy that dict names. */
static int read_parameters(PyObject *module, PyObject *dict, skv_method *method) {
    skv_error error;
    PyObject *value;
    for (const skv_parameter *p = skv_parameters; p->name; p++) {
        if (!(value = item(dict, p->name)) || !strcmp(p->name, "budget")) continue;
        if (!skv_policy_takes(method->policy, p->name))
            return py_config_error(module, "%s has no parameter \"%s\"; allowed: %s", method->policy->name, p->name,
                                   method->policy->parameters),
                   -1;
        const double number = PyFloat_AsDouble(value);
        if (PyErr_Occurred()) return -1;
        if (skv_method_set(method, p->name, number, &error)) return py_raise(module, &error), -1;
    }
    return 0;
}

int py_method(PyObject *module, PyObject *dict, skv_method *method, py_custom *custom, PyObject **held) {
    PyObject *value;
    PyArrayObject *budgets = NULL;
    if (dict && !PyDict_Check(dict)) return py_config_error(module, "method is not a dict"), -1;
    const char *name = (value = item(dict, "name")) ? PyUnicode_AsUTF8(value) : "full";
    if (!name || PyErr_Occurred()) return -1;
    const skv_policy *policy = skv_policy_find(name);
    if (!policy) return py_config_error(module, "method \"%s\" is unknown", name), -1;
    *method = skv_method_of(policy);
    if (read_parameters(module, dict, method)) return -1;
    if ((value = item(dict, "protect"))) {
        int first, prompt;
        if (!PyArg_ParseTuple(value, "ip", &first, &prompt)) return -1;
        method->protect_first = first;
        method->protect_prompt = prompt;
    }
    if ((value = item(dict, "allocate"))) {
        const char *allocate = PyUnicode_AsUTF8(value);
        if (!allocate) return -1;
        method->by_layer = !strcmp(allocate, "layer");
        if (!method->by_layer && strcmp(allocate, "head"))
            return py_config_error(module, "allocate is \"%.40s\"; allowed: head, layer", allocate), -1;
    }
    if ((value = item(dict, "evict"))) method->evict = PyObject_IsTrue(value) == 1;
    if ((value = item(dict, "compat"))) method->compat = (unsigned)PyLong_AsUnsignedLongMask(value);
    if ((value = item(dict, "needs"))) method->custom_needs = (unsigned)PyLong_AsUnsignedLongMask(value);
    if (policy->flags & SKV_COMPACTS) {
        if (!(value = item(dict, "budget"))) return py_config_error(module, "%s needs a budget", name), -1;
        budgets = py_array(module, value, "budget", NPY_INT32, 2, (npy_intp[]){-1, -1});
    }
    value = policy->flags & SKV_CUSTOM ? item(dict, "score") : NULL;
    if (policy->flags & SKV_CUSTOM && !(value && PyCallable_Check(value)))
        py_config_error(module, "score of a custom method is not callable");
    if (PyErr_Occurred()) {
        Py_XDECREF(budgets);
        return -1;
    }
    if (value) {
        *custom = (py_custom){.module = module, .function = Py_NewRef(value)};
        method->custom = call_custom;
        method->context = custom;
    }
    method->budgets = budgets ? PyArray_DATA(budgets) : NULL;
    *held = (PyObject *)budgets;
    return 0;
}

/* Whether starts [n + 1] part n_bytes bytes among n tokens. */
static bool are_starts(const int64_t *starts, npy_intp n, npy_intp n_bytes) {
    bool ascend = starts[0] == 0 && starts[n] == n_bytes;
    for (npy_intp i = 0; i < n; i++) ascend &= starts[i] <= starts[i + 1];
    return ascend;
}

int py_vocabulary(PyObject *module, PyObject *tuple, skv_vocabulary *v, npy_intp vocab, PyObject **held) {
    *v = (skv_vocabulary){0};
    if (tuple == Py_None) return 0;
    PyObject *flags, *runs, *bytes, *starts;
    if (!PyArg_ParseTuple(tuple, "OOOO", &flags, &runs, &bytes, &starts)) return -1;
    PyArrayObject *f = py_array(module, flags, "vocabulary flags", NPY_UINT8, 1, (npy_intp[]){vocab});
    PyArrayObject *r = f ? py_array(module, runs, "marker runs", NPY_INT32, 2, (npy_intp[]){-1, 3}) : NULL;
    PyArrayObject *b = r ? py_array(module, bytes, "tokens' bytes", NPY_UINT8, 1, (npy_intp[]){-1}) : NULL;
    PyArrayObject *s = b ? py_array(module, starts, "tokens' starts", NPY_INT64, 1, (npy_intp[]){vocab + 1}) : NULL;
    if (s && are_starts(PyArray_DATA(s), vocab, PyArray_SIZE(b))) {
        v->flags = PyArray_DATA(f);
        v->runs = (const int32_t(*)[3])PyArray_DATA(r);
        v->n_runs = (size_t)PyArray_DIM(r, 0);
        v->bytes = PyArray_DATA(b);
        v->starts = PyArray_DATA(s);
        *held = PyTuple_Pack(4, f, r, b, s);
    } else if (s) {
        py_config_error(module, "tokens' starts: expected from 0 to %zd, ascending; found others",
                        (Py_ssize_t)PyArray_SIZE(b));
    }
    Py_XDECREF(f);
    Py_XDECREF(r);
    Py_XDECREF(b);
    Py_XDECREF(s);
    return *held ? 0 : -1;
}
