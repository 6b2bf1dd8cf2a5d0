/* Methods and vocabularies as Python gives them, and the call of a custom score. */
#include "binding.h"

#include <math.h>

/* dict[key] borrowed, NULL where it is absent or None. */
static PyObject *item(PyObject *dict, const char *key) {
    PyObject *value = PyDict_GetItemString(dict, key);
    return value == Py_None ? NULL : value;
}

static int set(PyObject *dict, const char *key, PyObject *value) {
    const int failed = !value || PyDict_SetItemString(dict, key, value);
    Py_XDECREF(value);
    return failed;
}

static PyObject *floats(const float *data, npy_intp n) { return py_copy(data, NPY_FLOAT, 1, &n); }

/* keys [L, dim], positions [L] and what was asked for. Copies: the function may keep them, the workspace it may not. */
static PyObject *candidates(const skv_scoring *s) {
    PyObject *dict = PyDict_New();
    const unsigned needs = s->method->custom_needs;
    const npy_intp n = (npy_intp)s->n_slots, c = (npy_intp)s->n_candidates, dim = (npy_intp)s->dim;
    PyObject *keys = PyArray_SimpleNew(2, ((npy_intp[]){n, dim}), NPY_FLOAT);
    for (npy_intp i = 0; keys && i < n; i++)
        memcpy(PyArray_GETPTR2((PyArrayObject *)keys, i, 0), s->keys + (size_t)i * s->stride, s->dim * sizeof(float));
    int failed = !dict || set(dict, "keys", keys) || set(dict, "positions", py_copy(s->positions, NPY_INT32, 1, &n)) ||
                 set(dict, "n_candidates", PyLong_FromSsize_t(c)) || set(dict, "layer", PyLong_FromSize_t(s->layer)) ||
                 set(dict, "head", PyLong_FromSize_t(s->head));
    if (!failed && (needs & SKV_NEEDS_QUERIES)) {
        PyObject *queries = PyArray_SimpleNew(3, ((npy_intp[]){(npy_intp)s->group, (npy_intp)s->n_queries, dim}), NPY_FLOAT);
        for (size_t q = 0; queries && q < s->n_queries; q++)
            for (size_t g = 0; g < s->group; g++)
                memcpy(PyArray_GETPTR3((PyArrayObject *)queries, (npy_intp)g, (npy_intp)q, 0), s->queries + (q * s->group + g) * s->stride,
                       s->dim * sizeof(float));
        failed = set(dict, "queries", queries);
    }
    const struct {
        unsigned bit;
        const char *name;
        const float *data;
        npy_intp n;
    } arrays[] = {{SKV_NEEDS_SUMS, "sums", s->sums, n},
                  {SKV_NEEDS_SENTENCES, "penalties", s->penalty, n},
                  {SKV_GIVES_IMPORTANCE, "importance", s->importance, c},
                  {SKV_GIVES_REDUNDANCY, "redundancy", s->redundancy, n}};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        if (!failed && (needs & arrays[i].bit)) failed = set(dict, arrays[i].name, floats(arrays[i].data, arrays[i].n));
    if (failed) Py_CLEAR(dict);
    return dict;
}

static bool call_custom(void *context, skv_scoring *s) {
    py_custom *custom = context;
    const PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *dict = candidates(s), *result = NULL;
    PyArrayObject *score = NULL;
    if (dict) result = PyObject_CallOneArg(custom->function, dict);
    if (result) score = py_array(custom->module, result, "custom score", NPY_FLOAT, 1, (npy_intp[]){(npy_intp)s->n_candidates});
    for (size_t j = 0; score && j < s->n_candidates; j++) {
        s->score[j] = *(float *)PyArray_GETPTR1(score, (npy_intp)j);
        if (!isnan(s->score[j])) continue;
        py_config_error(custom->module, "custom score of candidate %zu (layer %zu, head %zu) is nan; allowed: numbers", j, s->layer,
                        s->head);
        break;
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

int py_method(PyObject *module, PyObject *dict, skv_method *method, py_custom *custom, PyObject **held) {
    skv_error error;
    PyObject *value;
    if (!PyDict_Check(dict)) return py_config_error(module, "method is not a dict"), -1;
    const char *name = (value = item(dict, "name")) ? PyUnicode_AsUTF8(value) : "full";
    if (!name) return -1;
    const skv_policy *policy = skv_policy_find(name);
    if (!policy) return py_config_error(module, "method \"%s\" is unknown", name), -1;
    *method = skv_method_of(policy);
    for (const skv_parameter *p = skv_parameters; p->name; p++) {
        if (!(value = item(dict, p->name)) || !strcmp(p->name, "budget")) continue;
        if (!skv_policy_takes(policy, p->name))
            return py_config_error(module, "%s has no parameter \"%s\"; allowed: %s", name, p->name, policy->parameters), -1;
        const double number = PyFloat_AsDouble(value);
        if (PyErr_Occurred()) return -1;
        if (skv_method_set(method, p->name, number, &error)) return py_raise(module, &error), -1;
    }
    if ((value = item(dict, "protect"))) {
        int first, prompt;
        if (!PyArg_ParseTuple(value, "ip", &first, &prompt)) return -1;
        method->protect_first = first;
        method->protect_prompt = prompt;
    }
    if ((value = item(dict, "evict"))) method->evict = PyObject_IsTrue(value) == 1;
    if ((value = item(dict, "compat"))) method->compat = (unsigned)PyLong_AsUnsignedLongMask(value);
    if ((value = item(dict, "needs"))) method->custom_needs = (unsigned)PyLong_AsUnsignedLongMask(value);
    if (policy->needs & SKV_NEEDS_CALLER) {
        value = item(dict, "score");
        if (!value || !PyCallable_Check(value)) return py_config_error(module, "score of a custom method is not callable"), -1;
        custom->function = value; /* borrowed from dict, which the caller holds */
        custom->module = module;
        method->custom = call_custom;
        method->context = custom;
    }
    if (PyErr_Occurred()) return -1;
    if (policy->needs & SKV_COMPACTS) {
        if (!(value = item(dict, "budget"))) return py_config_error(module, "%s needs a budget", name), -1;
        PyArrayObject *budgets = py_array(module, value, "budget", NPY_INT32, 2, (npy_intp[]){-1, -1});
        if (!budgets) return -1;
        method->budgets = PyArray_DATA(budgets);
        *held = (PyObject *)budgets;
    }
    return 0;
}

int py_vocabulary(PyObject *module, PyObject *tuple, skv_vocabulary *v, npy_intp vocab, PyObject **held) {
    *v = (skv_vocabulary){0};
    if (tuple == Py_None) return 0;
    PyObject *flags, *runs, *ways;
    int n_open;
    if (!PyArg_ParseTuple(tuple, "OOOi", &flags, &runs, &ways, &n_open)) return -1;
    PyArrayObject *f = py_array(module, flags, "vocabulary flags", NPY_UINT8, 1, (npy_intp[]){vocab});
    PyArrayObject *r = f ? py_array(module, runs, "marker runs", NPY_INT32, 2, (npy_intp[]){-1, 3}) : NULL;
    PyArrayObject *w = r ? py_array(module, ways, "think markers", NPY_INT32, 2, (npy_intp[]){-1, SKV_WAY}) : NULL;
    if (w && n_open >= 0 && n_open <= PyArray_DIM(w, 0)) {
        v->flags = PyArray_DATA(f);
        v->runs = (const int32_t(*)[3])PyArray_DATA(r);
        v->ways = (const int32_t(*)[SKV_WAY])PyArray_DATA(w);
        v->n_runs = (size_t)PyArray_DIM(r, 0);
        v->n_open = (size_t)n_open;
        v->n_close = (size_t)PyArray_DIM(w, 0) - (size_t)n_open;
        *held = PyTuple_Pack(3, f, r, w);
    } else if (w) {
        py_config_error(module, "%d think markers open; allowed: 0 to %zd", n_open, (Py_ssize_t)PyArray_DIM(w, 0));
    }
    Py_XDECREF(f);
    Py_XDECREF(r);
    Py_XDECREF(w);
    return *held ? 0 : -1;
}
