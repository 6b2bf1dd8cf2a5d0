/* The module: the core's tables (families, tensors, CPU variants, methods), its two nouns, Model and Session, and its
 * functions on arrays.
 */
#define SKV_MODULE
#include "binding.h"

PyObject *py_raise(PyObject *module, const skv_error *error) {
    if (PyErr_Occurred()) return NULL; /* what failed before it is told */
    static const char *const names[] = {[SKV_CHECKPOINT] = "CheckpointError",
                                        [SKV_CONFIG] = "ConfigError",
                                        [SKV_CAPACITY] = "CapacityError",
                                        [SKV_BACKEND] = "BackendError",
                                        [SKV_CALLER] = "Error"};
    module_state *state = PyModule_GetState(module);
    PyObject *class = PyObject_GetAttrString(state->errors, names[error->code]);
    if (class) PyErr_SetString(class, error->text);
    Py_XDECREF(class);
    return NULL;
}

PyObject *py_config_error(PyObject *module, const char *format, ...) {
    skv_error error = {.code = SKV_CONFIG};
    va_list arguments;
    va_start(arguments, format);
    PyOS_vsnprintf(error.text, sizeof error.text, format, arguments);
    va_end(arguments);
    return py_raise(module, &error);
}

PyObject *py_module_of(PyObject *self) { return PyType_GetModule(Py_TYPE(self)); }

int py_in_use(int busy, const char *what) {
    if (busy) PyErr_Format(PyExc_RuntimeError, "this %s is in use by another thread", what);
    return busy;
}

static int has_shape(PyArrayObject *array, int n_dims, const npy_intp *shape) {
    if (PyArray_NDIM(array) != n_dims) return 0;
    for (int i = 0; i < n_dims; i++)
        if (shape[i] >= 0 && PyArray_DIM(array, i) != shape[i]) return 0;
    return 1;
}

/* "[3, n]" */
static void shape_text(char *text, size_t size, int n_dims, const npy_intp *shape) {
    size_t at = (size_t)PyOS_snprintf(text, size, "[");
    for (int i = 0; i < n_dims && at < size - 24; i++)
        at +=
            (size_t)(shape[i] < 0 ? PyOS_snprintf(text + at, size - at, "%sn", i ? ", " : "")
                                  : PyOS_snprintf(text + at, size - at, "%s%zd", i ? ", " : "", (Py_ssize_t)shape[i]));
    PyOS_snprintf(text + at, size - at, "]");
}

static PyArrayObject *checked(PyObject *module, PyArrayObject *array, const char *name, int n_dims,
                              const npy_intp *shape) {
    if (!array || has_shape(array, n_dims, shape)) return array;
    char expected[128], found[128];
    shape_text(expected, sizeof expected, n_dims, shape);
    shape_text(found, sizeof found, PyArray_NDIM(array) < 4 ? PyArray_NDIM(array) : 4, PyArray_DIMS(array));
    py_config_error(module, "%s: expected shape %s, found %s", name, expected, found);
    Py_DECREF(array);
    return NULL;
}

static PyArrayObject *as_array(PyObject *module, PyObject *object, const char *name, int type, int copies, int n_dims,
                               const npy_intp *shape) {
    const int narrows = type == NPY_FLOAT ? NPY_ARRAY_FORCECAST : 0; /* float64 is rounded; integers are never cut */
    const int flags = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_NOTSWAPPED | narrows | copies;
    PyArrayObject *given = (PyArrayObject *)PyArray_FROM_O(object), *array = NULL;
    if (given && !(PyArray_ISINTEGER(given) || PyArray_ISFLOAT(given) || PyArray_ISBOOL(given)))
        PyErr_SetNone(PyExc_TypeError); /* a cast would read texts, and cut complex numbers */
    else if (given)
        array = (PyArrayObject *)PyArray_FROMANY((PyObject *)given, type, 0, 0, flags);
    Py_XDECREF(given);
    if (!array && (PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError))) {
        PyErr_Clear();
        PyArray_Descr *wanted = PyArray_DescrFromType(type);
        py_config_error(module, "%s: expected an array of type %s, found %s", name, wanted->typeobj->tp_name,
                        Py_TYPE(object)->tp_name);
        Py_DECREF(wanted);
    }
    return checked(module, array, name, n_dims, shape);
}

PyArrayObject *py_array(PyObject *module, PyObject *object, const char *name, int type, int n_dims,
                        const npy_intp *shape) {
    return as_array(module, object, name, type, NPY_ARRAY_ENSURECOPY, n_dims, shape);
}

PyArrayObject *py_borrowed(PyObject *module, PyObject *object, const char *name, int type, int n_dims,
                           const npy_intp *shape) {
    return as_array(module, object, name, type, 0, n_dims, shape);
}

PyArrayObject *py_output(PyObject *module, PyObject *object, const char *name, int type, int n_dims,
                         const npy_intp *shape) {
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != type || !PyArray_ISCARRAY(array)) {
        py_config_error(module, "%s: expected a writable C-contiguous array of its type", name);
        return NULL;
    }
    Py_INCREF(array);
    return checked(module, array, name, n_dims, shape);
}

PyObject *py_copy(const void *data, int type, int n_dims, const npy_intp *shape) {
    PyObject *array = PyArray_SimpleNew(n_dims, shape, type);
    if (array && PyArray_NBYTES((PyArrayObject *)array) > 0)
        memcpy(PyArray_DATA((PyArrayObject *)array), data, (size_t)PyArray_NBYTES((PyArrayObject *)array));
    return array;
}

bool py_dtype_allowed(int type, py_use use) {
    const skv_dtype_info *info = skv_dtypes + type;
    return use == PY_STORED ? info->widen != NULL : use == PY_WEIGHTS ? info->of_weights : info->of_cache;
}

int py_dtype(PyObject *module, const char *name, py_use use) {
    char allowed[64] = "";
    for (int i = 0; i < SKV_N_DTYPES; i++) {
        if (!py_dtype_allowed(i, use)) continue;
        if (!strcmp(skv_dtypes[i].name, name)) return i;
        const size_t at = strlen(allowed);
        PyOS_snprintf(allowed + at, sizeof allowed - at, "%s%s", at ? ", " : "", skv_dtypes[i].name);
    }
    py_config_error(module, "dtype is \"%.40s\"; allowed: %s", name, allowed);
    return -1;
}

int py_set(PyObject *dict, const char *name, PyObject *value) {
    const int failed = !value || PyDict_SetItemString(dict, name, value);
    Py_XDECREF(value);
    return failed;
}

static PyObject *strings(const char *const *names, size_t n) {
    PyObject *tuple = PyTuple_New((Py_ssize_t)n);
    for (size_t i = 0; tuple && i < n; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name)
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, name);
        else
            Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *dtypes(py_use use) {
    const char *names[SKV_N_DTYPES];
    size_t n = 0;
    for (int i = 0; i < SKV_N_DTYPES; i++)
        if (py_dtype_allowed(i, use)) names[n++] = skv_dtypes[i].name;
    return strings(names, n);
}

/* What Python would otherwise have to write down again. */
static PyObject *constants(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    static const char *const levels[SKV_N_TRACE_LEVELS] = {"none", "kept", "scores"};
    const struct {
        const char *name;
        long value;
    } numbers[] = {{"page", SKV_PAGE},
                   {"max_budget", SKV_MAX_BUDGET},
                   {"max_threads", SKV_MAX_THREADS},
                   {"max_layers", SKV_MAX_LAYERS},
                   {"max_head_dim", SKV_MAX_HEAD_DIM},
                   {"delimiter", SKV_DELIMITER},
                   {"marker", SKV_MARKER},
                   {"paragraph", SKV_PARAGRAPH},
                   {"newline", SKV_NEWLINE}};
    PyObject *all = PyDict_New(), *compat = PyDict_New(), *trace = PyDict_New();
    int failed = !all || !compat || !trace;
    for (long i = 0; !failed && skv_compat_names[i]; i++)
        failed = py_set(compat, skv_compat_names[i], PyLong_FromLong(1L << i));
    for (long i = 0; !failed && i < SKV_N_TRACE_LEVELS; i++) failed = py_set(trace, levels[i], PyLong_FromLong(i));
    for (size_t i = 0; !failed && i < sizeof numbers / sizeof *numbers; i++)
        failed = py_set(all, numbers[i].name, PyLong_FromLong(numbers[i].value));
    failed = failed || PyDict_SetItemString(all, "compat", compat) || py_set(all, "needs", py_needs()) ||
             py_set(all, "scopes", strings(skv_scope_names, SKV_N_SCOPES)) ||
             PyDict_SetItemString(all, "trace", trace) || py_set(all, "dtypes", dtypes(PY_STORED)) ||
             py_set(all, "weight_dtypes", dtypes(PY_WEIGHTS)) || py_set(all, "cache_dtypes", dtypes(PY_CACHE));
    if (failed) Py_CLEAR(all);
    Py_XDECREF(compat);
    Py_XDECREF(trace);
    return all;
}

static PyObject *families(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    PyObject *const truth[] = {Py_False, Py_True};
    PyObject *const biases[] = {[SKV_BIAS_NEVER] = Py_False, [SKV_BIAS_ALWAYS] = Py_True, [SKV_BIAS_CONFIG] = Py_None};
    PyObject *all = PyDict_New();
    int failed = !all;
    for (const skv_family *f = skv_families; !failed && f->name; f++)
        failed = py_set(all, f->name,
                        Py_BuildValue("{s:s,s:O,s:O,s:O,s:O,s:O,s:O,s:O,s:d,s:N}", "architecture", f->architecture,
                                      "qkv_bias", biases[f->qkv_bias], "o_bias", biases[f->o_bias], "mlp_bias",
                                      biases[f->mlp_bias], "qk_norm", truth[f->qk_norm], "skips_rope",
                                      truth[f->skips_rope], "slides", truth[f->slides], "tied", truth[f->tied],
                                      "rope_theta", f->rope_theta, "rope", strings(skv_rope_names, SKV_N_ROPES)));
    if (failed) Py_CLEAR(all);
    return all;
}

static PyObject *variants(PyObject *module, PyObject *args) {
    const char *library = NULL;
    const skv_backend *backend = NULL;
    skv_error error;
    skv_variant v;
    if (!PyArg_ParseTuple(args, "|z", &library)) return NULL;
    if (library && !(backend = skv_backend_load(library, &error))) return py_raise(module, &error);
    PyObject *all = PyDict_New();
    for (size_t i = 0; all && skv_variant_at(backend, i, &v); i++)
        if (py_set(all, v.name, Py_BuildValue("Os", v.runs_here ? Py_True : Py_False, v.about))) Py_CLEAR(all);
    return all;
}

extern PyObject *py_tensors(PyObject *module, PyObject *config);

static PyMethodDef methods[] = {
    {"families", families, METH_NOARGS, "families() -> dict: model families and what distinguishes them."},
    {"tensors", py_tensors, METH_O,
     "tensors(config) -> list of (name, shape, is_matrix) that a checkpoint of this configuration holds."},
    {"constants", constants, METH_NOARGS, "constants() -> dict: sizes, limits, bits and names that the core defines."},
    {"variants", variants, METH_VARARGS,
     "variants(library=None) -> dict: variants of the CPU, or devices of the backend in a shared object, best first, "
     "whether this machine runs each, and what it is or why not."},
    {"methods", py_methods, METH_NOARGS,
     "methods() -> (dict of eviction methods, dict of their parameters): the core's tables."},
    {"check_method", py_check_method, METH_VARARGS,
     "check_method(method, n_prompt, reserve=0): raises ConfigError for a method that cannot run."},
    {"method_needs", py_method_needs, METH_O,
     "method_needs(method) -> int: what it is and needs, bits of constants()."},
    {"select", (PyCFunction)(void (*)(void))py_select, METH_VARARGS | METH_KEYWORDS,
     "select(method, keys, queries, positions, penalties, sums, prompt, sequence, layer): see skipkv.select."},
    {"segment", py_segment, METH_VARARGS, "segment(ids, vocabulary, vocab, n_prompt, compat): see skipkv.segment."},
    {"flag_repeats", py_flag_repeats, METH_VARARGS, "flag_repeats(vectors, tau, compat): see skipkv.flag_repeats."},
    {0},
};

static int module_exec(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    state->errors = PyImport_ImportModule("skipkv.errors");
    if (!state->errors) return -1;
    state->model = (PyTypeObject *)PyType_FromModuleAndSpec(module, &py_model_spec, NULL);
    if (!state->model || PyModule_AddType(module, state->model)) return -1;
    PyObject *session = PyType_FromModuleAndSpec(module, &py_session_spec, NULL);
    const int failed = !session || PyModule_AddType(module, (PyTypeObject *)session);
    Py_XDECREF(session);
    return failed ? -1 : 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->errors);
    Py_VISIT(state->model);
    return 0;
}

static int module_clear(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->errors);
    Py_CLEAR(state->model);
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, module_exec}, {0}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "skipkv._skipkv",    .m_size = sizeof(module_state), .m_methods = methods,
    .m_slots = slots,      .m_traverse = module_traverse, .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__skipkv(void) { return PyModuleDef_Init(&definition); }
