/* The Python binding: the only file that includes Python.h. Today it shows the tables of the core: families, tensors, CPU variants. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "weights.h"

typedef struct module_state {
    PyObject *errors; /* module skipkv.errors */
} module_state;

/* The one funnel from status codes to exceptions. Returns NULL. */
static PyObject *raise(PyObject *module, const skv_error *error) {
    static const char *const names[] = {
        [SKV_CHECKPOINT] = "CheckpointError", [SKV_CONFIG] = "ConfigError", [SKV_CAPACITY] = "CapacityError", [SKV_BACKEND] = "BackendError"};
    module_state *state = PyModule_GetState(module);
    PyObject *class = PyObject_GetAttrString(state->errors, names[error->code]);
    if (class) PyErr_SetString(class, error->text);
    Py_XDECREF(class);
    return NULL;
}

static PyObject *families(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    PyObject *all = PyDict_New();
    for (const skv_family *const *f = skv_families; all && *f; f++) {
        PyObject *values[] = {[SKV_BIAS_NEVER] = Py_False, [SKV_BIAS_ALWAYS] = Py_True, [SKV_BIAS_CONFIG] = Py_None};
        PyObject *rope = PyTuple_New(SKV_N_ROPES);
        for (Py_ssize_t i = 0; rope && i < SKV_N_ROPES; i++) PyTuple_SET_ITEM(rope, i, PyUnicode_FromString(skv_rope_names[i]));
        PyObject *row = rope ? Py_BuildValue("{s:s,s:O,s:O,s:O,s:O,s:N}", "architecture", (*f)->architecture, "qkv_bias", values[(*f)->qkv_bias],
                                             "o_bias", values[(*f)->o_bias], "mlp_bias", values[(*f)->mlp_bias], "qk_norm",
                                             (*f)->qk_norm ? Py_True : Py_False, "rope", rope)
                             : NULL;
        if (!row || PyDict_SetItemString(all, (*f)->name, row)) Py_CLEAR(all);
        Py_XDECREF(row);
    }
    return all;
}

/* config[key] as a C number; with an exception set, *failed becomes 1. */
static double number(PyObject *config, const char *key, int *failed) {
    PyObject *value = *failed ? NULL : PyMapping_GetItemString(config, key);
    const double result = value ? PyFloat_AsDouble(value) : 0;
    Py_XDECREF(value);
    if (PyErr_Occurred()) *failed = 1;
    return result;
}

/* Numbers beyond an int32 become −1, which skv_config_check refuses by name. */
static int32_t integer(PyObject *config, const char *key, int *failed) {
    const double value = number(config, key, failed);
    return value >= 0 && value <= INT32_MAX ? (int32_t)value : -1;
}

/* The family that config names, NULL with an exception set. */
static const skv_family *family_of(PyObject *config) {
    PyObject *value = PyMapping_GetItemString(config, "family");
    const char *name = value ? PyUnicode_AsUTF8(value) : NULL;
    const skv_family *family = name ? skv_family_find(name) : NULL;
    if (name && !family) PyErr_Format(PyExc_ValueError, "config: family \"%s\" is unknown", name);
    Py_XDECREF(value);
    return family;
}

static int read_config(PyObject *config, skv_config *c) {
    int failed = 0;
    *c = (skv_config){.family = family_of(config)};
    if (!c->family) return -1;
    c->n_layers = integer(config, "n_layers", &failed);
    c->n_heads = integer(config, "n_heads", &failed);
    c->n_kv_heads = integer(config, "n_kv_heads", &failed);
    c->head_dim = integer(config, "head_dim", &failed);
    c->hidden = integer(config, "hidden", &failed);
    c->ffn = integer(config, "ffn", &failed);
    c->vocab = integer(config, "vocab", &failed);
    c->context = integer(config, "context", &failed);
    c->norm_eps = (float)number(config, "norm_eps", &failed);
    c->tied = number(config, "tied", &failed) != 0;
    c->qkv_bias = number(config, "qkv_bias", &failed) != 0;
    c->o_bias = number(config, "o_bias", &failed) != 0;
    c->mlp_bias = number(config, "mlp_bias", &failed) != 0;
    c->rope_theta = number(config, "rope_theta", &failed);
    return failed ? -1 : 0;
}

static PyObject *tensors(PyObject *module, PyObject *config_dict) {
    skv_config config;
    skv_error error;
    const skv_backend *backend;
    if (read_config(config_dict, &config)) return NULL;
    if (skv_backend_find("generic", &backend, &error)) return raise(module, &error);
    skv_model *model = skv_model_new(&config, backend, SKV_F32, &error);
    if (!model) return raise(module, &error);
    PyObject *list = PyList_New((Py_ssize_t)model->n_slots);
    for (size_t i = 0; list && i < model->n_slots; i++) {
        const skv_slot *s = model->slots + i;
        PyObject *row = s->columns ? Py_BuildValue("s(ii)O", s->name, s->rows, s->columns, Py_True) : Py_BuildValue("s(i)O", s->name, s->rows, Py_False);
        if (row)
            PyList_SET_ITEM(list, (Py_ssize_t)i, row);
        else
            Py_CLEAR(list);
    }
    skv_model_free(model);
    return list;
}

static PyObject *variants(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    PyObject *all = PyDict_New();
    for (const skv_backend *const *b = skv_backends; all && *b; b++)
        if (PyDict_SetItemString(all, (*b)->name, skv_backend_runs_here(*b) ? Py_True : Py_False)) Py_CLEAR(all);
    return all;
}

static PyMethodDef methods[] = {
    {"families", families, METH_NOARGS, "families() -> dict: model families and what distinguishes them."},
    {"tensors", tensors, METH_O, "tensors(config) -> list of (name, shape, is_matrix) that a checkpoint of this configuration holds."},
    {"variants", variants, METH_NOARGS, "variants() -> dict: CPU variants, best first, and whether this machine runs each."},
    {0},
};

static int module_exec(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    state->errors = PyImport_ImportModule("skipkv.errors");
    return state->errors ? 0 : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->errors);
    return 0;
}

static int module_clear(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->errors);
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, module_exec}, {0}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "skipkv._skipkv",
    .m_size = sizeof(module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__skipkv(void) { return PyModuleDef_Init(&definition); }
