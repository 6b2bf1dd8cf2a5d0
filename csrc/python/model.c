#include "binding.h"

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
static const skv_family *family_of(PyObject *module, PyObject *config) {
    PyObject *value = PyMapping_GetItemString(config, "family");
    const char *name = value ? PyUnicode_AsUTF8(value) : NULL;
    const skv_family *family = name ? skv_family_find(name) : NULL;
    if (name && !family) py_config_error(module, "config: family \"%s\" is unknown", name);
    Py_XDECREF(value);
    return family;
}

/* config["unrotated"]: indices of layers without RoPE. */
static void read_unrotated(PyObject *module, PyObject *config, skv_config *c, int *failed) {
    PyObject *value = *failed ? NULL : PyMapping_GetItemString(config, "unrotated");
    PyObject *layers = value ? PySequence_Fast(value, "config: unrotated must be a sequence of layers") : NULL;
    const Py_ssize_t n = layers ? PySequence_Fast_GET_SIZE(layers) : 0;
    for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); i++) {
        const long layer = PyLong_AsLong(PySequence_Fast_GET_ITEM(layers, i));
        if (layer >= 0 && layer < SKV_MAX_LAYERS)
            c->unrotated[layer / 64] |= (uint64_t)1 << layer % 64;
        else if (!PyErr_Occurred())
            py_config_error(module, "config: unrotated holds layer %ld; allowed: 0 to %d", layer, SKV_MAX_LAYERS - 1);
    }
    Py_XDECREF(layers);
    Py_XDECREF(value);
    if (PyErr_Occurred()) *failed = 1;
}

/* The index of config[key] in names; with an exception set, *failed becomes 1. */
static int named(PyObject *module, PyObject *config, const char *key, const char *const *names, int n, int *failed) {
    PyObject *value = *failed ? NULL : PyMapping_GetItemString(config, key);
    const char *name = value ? PyUnicode_AsUTF8(value) : NULL;
    int found = 0;
    while (name && found < n && strcmp(names[found], name)) found++;
    if (name && found == n) py_config_error(module, "config: %s \"%s\" is unknown", key, name);
    Py_XDECREF(value);
    if (PyErr_Occurred()) *failed = 1;
    return found < n ? found : 0;
}

static int read_config(PyObject *module, PyObject *config, skv_config *c) {
    int failed = 0;
    *c = (skv_config){.family = family_of(module, config)};
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
    c->rope_type = (skv_rope)named(module, config, "rope_type", skv_rope_names, SKV_N_ROPES, &failed);
    c->rope_factor = number(config, "rope_factor", &failed);
    c->rope_original_context = number(config, "rope_original_context", &failed);
    c->rope_low_freq_factor = number(config, "rope_low_freq_factor", &failed);
    c->rope_high_freq_factor = number(config, "rope_high_freq_factor", &failed);
    c->rope_beta_fast = number(config, "rope_beta_fast", &failed);
    c->rope_beta_slow = number(config, "rope_beta_slow", &failed);
    c->rope_truncate = number(config, "rope_truncate", &failed) != 0;
    c->rope_attention_factor = number(config, "rope_attention_factor", &failed);
    read_unrotated(module, config, c, &failed);
    return failed ? -1 : 0;
}

PyObject *py_tensors(PyObject *module, PyObject *config_dict) {
    skv_config config;
    skv_error error;
    if (read_config(module, config_dict, &config)) return NULL;
    skv_model *model = skv_model_new(&config, NULL, "generic", SKV_F32, &error);
    if (!model) return py_raise(module, &error);
    PyObject *list = PyList_New(0);
    const char *name;
    int32_t rows, columns;
    for (size_t i = 0; list && (name = skv_model_tensor(model, i, &rows, &columns)); i++) {
        PyObject *row = columns ? Py_BuildValue("s(ii)O", name, rows, columns, Py_True)
                                : Py_BuildValue("s(i)O", name, rows, Py_False);
        if (!row || PyList_Append(list, row)) Py_CLEAR(list);
        Py_XDECREF(row);
    }
    skv_model_free(model);
    return list;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *config_dict, *module = PyType_GetModule(type);
    const char *dtype = "f32", *variant = NULL, *library = NULL;
    char *names[] = {"config", "dtype", "variant", "library", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|szz", names, &config_dict, &dtype, &variant, &library))
        return NULL;
    const skv_backend *backend = NULL;
    skv_config config;
    skv_error error;
    const int weight_type = py_dtype(module, dtype, PY_WEIGHTS);
    if (weight_type < 0 || read_config(module, config_dict, &config)) return NULL;
    if (library && !(backend = skv_backend_load(library, &error))) return py_raise(module, &error);
    py_model *self = (py_model *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = skv_model_new(&config, backend, variant, (skv_dtype)weight_type, &error);
    if (self->model) return (PyObject *)self;
    py_raise(module, &error);
    Py_DECREF(self);
    return NULL;
}

static void model_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    skv_model_free(((py_model *)self)->model);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *model_bind(PyObject *self, PyObject *args) {
    skv_model *model = ((py_model *)self)->model;
    int *busy = &((py_model *)self)->busy;
    PyObject *module = py_module_of(self), *shape_tuple, *object, *result = NULL;
    const char *name, *dtype;
    int n_threads;
    if (!PyArg_ParseTuple(args, "ssO!Oi", &name, &dtype, &PyTuple_Type, &shape_tuple, &object, &n_threads)) return NULL;
    const Py_ssize_t n_dims = PyTuple_GET_SIZE(shape_tuple);
    const int type = py_dtype(module, dtype, PY_STORED);
    if (type < 0) return NULL;
    if (n_dims < 1 || n_dims > 2)
        return py_config_error(module, "tensor \"%s\" has %zd dimensions; allowed: 1 or 2", name, n_dims);
    int64_t shape[2] = {0};
    size_t bytes = skv_dtypes[type].size;
    for (Py_ssize_t i = 0; i < n_dims; i++) {
        shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape_tuple, i));
        if (PyErr_Occurred()) return NULL;
        if (__builtin_mul_overflow(bytes, (size_t)shape[i], &bytes)) bytes = SIZE_MAX;
    }
    PyArrayObject *data = py_borrowed(module, object, name, NPY_UINT8, 1, (npy_intp[]){-1});
    if (!data) return NULL;
    skv_error error;
    skv_status status = SKV_OK;
    if (bytes != (size_t)PyArray_SIZE(data) || n_threads < 1 || n_threads > SKV_MAX_THREADS) {
        py_config_error(module, "tensor \"%s\": %zd bytes for a shape of %zu, %d threads", name,
                        (Py_ssize_t)PyArray_SIZE(data), bytes, n_threads);
        goto cleanup;
    }
    if (py_in_use(*busy, "model")) goto cleanup;
    *busy = 1;
    Py_BEGIN_ALLOW_THREADS status =
        skv_model_bind(model, name, (skv_dtype)type, shape, (int)n_dims, PyArray_DATA(data), n_threads, &error);
    Py_END_ALLOW_THREADS *busy = 0;
    result = status ? py_raise(module, &error) : Py_NewRef(Py_None);
cleanup:
    Py_DECREF(data);
    return result;
}

/* Bandwidth and peak of this machine with this variant's kernels, over a buffer of this many bytes. */
static PyObject *model_limits(PyObject *self, PyObject *args) {
    const skv_model *model = ((py_model *)self)->model;
    Py_ssize_t n_bytes;
    int n_threads;
    if (!PyArg_ParseTuple(args, "ni", &n_bytes, &n_threads)) return NULL;
    if (n_bytes < 4096 || n_threads < 1 || n_threads > SKV_MAX_THREADS)
        return py_config_error(py_module_of(self), "limits of %zd bytes, %d threads", n_bytes, n_threads);
    skv_limits l;
    skv_error error;
    skv_status status;
    Py_BEGIN_ALLOW_THREADS status = skv_model_limits(model, (size_t)n_bytes, n_threads, &l, &error);
    Py_END_ALLOW_THREADS if (status) return py_raise(py_module_of(self), &error);
    return Py_BuildValue("ddd", l.bytes, l.macs, l.weight_macs);
}

static PyObject *model_bytes(PyObject *self, void *Py_UNUSED(closure)) {
    return PyLong_FromSize_t(skv_model_bytes(((py_model *)self)->model));
}

static PyObject *model_variant(PyObject *self, void *Py_UNUSED(closure)) {
    return PyUnicode_FromString(skv_model_variant(((py_model *)self)->model));
}

static PyObject *model_dtype(PyObject *self, void *Py_UNUSED(closure)) {
    return PyUnicode_FromString(skv_dtypes[skv_model_dtype(((py_model *)self)->model)].name);
}

static PyMethodDef model_methods[] = {
    {"bind", model_bind, METH_VARARGS,
     "bind(name, dtype, shape, data, threads): copies one tensor (data: its bytes, uint8) into the kernels' layout."},
    {"limits", model_limits, METH_VARARGS,
     "limits(n_bytes, threads) -> (bytes read from memory, multiply-accumulates of float32, those of the weights' "
     "type) "
     "that this variant's kernels reach in a second."},
    {0},
};
static PyGetSetDef model_getset[] = {{"n_bytes", model_bytes, NULL, "Bytes that the weights take.", NULL},
                                     {"dtype", model_dtype, NULL, "Type of the matrices.", NULL},
                                     {"variant", model_variant, NULL, "Name of the CPU variant or the device.", NULL},
                                     {0}};
static PyType_Slot model_slots[] = {{Py_tp_new, model_new},
                                    {Py_tp_dealloc, model_dealloc},
                                    {Py_tp_methods, model_methods},
                                    {Py_tp_getset, model_getset},
                                    {Py_tp_doc, "Model(config, dtype, variant, library): weights, bound one by one."},
                                    {0}};
PyType_Spec py_model_spec = {"skipkv._skipkv.Model", sizeof(py_model), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                             model_slots};
