/* The Python binding: the only file that includes Python.h. It shows the tables of the core (families, tensors, CPU variants) and
 * its two nouns, Model and Session. Arrays come and go through the buffer protocol. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

#include "session.h"

typedef struct module_state {
    PyObject *errors; /* module skipkv.errors */
    PyTypeObject *model;
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

/* The index of config[key] in names; with an exception set, *failed becomes 1. */
static int named(PyObject *config, const char *key, const char *const *names, int n, int *failed) {
    PyObject *value = *failed ? NULL : PyMapping_GetItemString(config, key);
    const char *name = value ? PyUnicode_AsUTF8(value) : NULL;
    int found = 0;
    while (name && found < n && strcmp(names[found], name)) found++;
    if (name && found == n) PyErr_Format(PyExc_ValueError, "config: %s \"%s\" is unknown", key, name);
    Py_XDECREF(value);
    if (PyErr_Occurred()) *failed = 1;
    return found < n ? found : 0;
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
    c->rope_type = (skv_rope)named(config, "rope_type", skv_rope_names, SKV_N_ROPES, &failed);
    if (c->rope_type != SKV_ROPE_DEFAULT) c->rope_factor = number(config, "rope_factor", &failed);
    if (c->rope_type == SKV_ROPE_LLAMA3) {
        c->rope_low_freq_factor = number(config, "rope_low_freq_factor", &failed);
        c->rope_high_freq_factor = number(config, "rope_high_freq_factor", &failed);
        c->rope_original_context = number(config, "rope_original_context", &failed);
    }
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

static const char *const dtype_names[SKV_N_DTYPES] = {[SKV_F32] = "f32", [SKV_BF16] = "bf16", [SKV_F16] = "f16"};

/* The dtype of this name; −1 with a ValueError that says what is allowed. */
static int dtype_of(const char *name, int n_allowed) {
    for (int i = 0; i < n_allowed; i++)
        if (!strcmp(dtype_names[i], name)) return i;
    PyErr_Format(PyExc_ValueError, "dtype is \"%s\"; allowed: f32, bf16%s", name, n_allowed > SKV_F16 ? ", f16" : "");
    return -1;
}

static PyObject *module_of(PyObject *self) { return PyType_GetModule(Py_TYPE(self)); }

/* --- Model --- */

typedef struct py_model {
    PyObject_HEAD
    skv_model *model;
} py_model;

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *config_dict;
    const char *dtype = "f32", *variant = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|sz", (char *[]){"config", "dtype", "variant", NULL}, &config_dict, &dtype, &variant))
        return NULL;
    skv_config config;
    skv_error error;
    const skv_backend *backend;
    const int weight_type = dtype_of(dtype, SKV_F16);
    if (weight_type < 0 || read_config(config_dict, &config)) return NULL;
    if (skv_backend_find(variant, &backend, &error)) return raise(PyType_GetModule(type), &error);
    py_model *self = (py_model *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = skv_model_new(&config, backend, (skv_dtype)weight_type, &error);
    if (self->model) return (PyObject *)self;
    raise(PyType_GetModule(type), &error);
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
    const char *name, *dtype;
    PyObject *shape_tuple;
    Py_buffer data;
    int n_threads;
    if (!PyArg_ParseTuple(args, "ssO!y*i", &name, &dtype, &PyTuple_Type, &shape_tuple, &data, &n_threads)) return NULL;
    PyObject *result = NULL;
    int64_t shape[2] = {0};
    const Py_ssize_t n_dims = PyTuple_GET_SIZE(shape_tuple);
    const int type = dtype_of(dtype, SKV_N_DTYPES);
    if (type < 0) goto cleanup;
    size_t bytes = skv_dtype_size((skv_dtype)type);
    for (Py_ssize_t i = 0; i < n_dims && i < 2; i++) {
        shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape_tuple, i));
        if (PyErr_Occurred()) goto cleanup;
        bytes = skv_mul(bytes, (size_t)shape[i]);
    }
    if (bytes != (size_t)data.len || n_threads < 1) {
        PyErr_Format(PyExc_ValueError, "tensor \"%s\": %zd bytes for a shape of %zu, threads %d", name, data.len, bytes, n_threads);
        goto cleanup;
    }
    skv_error error;
    skv_status status;
    Py_BEGIN_ALLOW_THREADS status = skv_model_bind(model, name, (skv_dtype)type, shape, (int)n_dims, data.buf, n_threads, &error);
    Py_END_ALLOW_THREADS result = status ? raise(module_of(self), &error) : Py_NewRef(Py_None);
cleanup:
    PyBuffer_Release(&data);
    return result;
}

static PyObject *model_bytes(PyObject *self, void *Py_UNUSED(closure)) { return PyLong_FromSize_t(((py_model *)self)->model->heap.live_bytes); }

static PyMethodDef model_methods[] = {
    {"bind", model_bind, METH_VARARGS, "bind(name, dtype, shape, data, threads): copies one tensor into the kernels' layout."},
    {0},
};
static PyGetSetDef model_getset[] = {{"n_bytes", model_bytes, NULL, "Bytes that the weights take.", NULL}, {0}};
static PyType_Slot model_slots[] = {{Py_tp_new, model_new}, {Py_tp_dealloc, model_dealloc}, {Py_tp_methods, model_methods},
                                    {Py_tp_getset, model_getset}, {Py_tp_doc, "Model(config, dtype='f32', variant=None): weights, bound one by one."}, {0}};
static PyType_Spec model_spec = {"skipkv._skipkv.Model", sizeof(py_model), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, model_slots};

/* --- Session --- */

typedef struct py_session {
    PyObject_HEAD
    skv_session *session;
    py_model *model; /* keeps the weights alive */
    int busy;        /* a forward runs without the GIL */
} py_session;

static PyObject *session_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    module_state *state = PyType_GetModuleState(type);
    PyObject *model;
    const char *cache = "f32";
    int rows = 1, tokens = 512, threads = 1;
    Py_ssize_t memory_limit = PY_SSIZE_T_MAX;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|iisni", (char *[]){"model", "rows", "tokens", "cache", "memory_limit", "threads", NULL},
                                     state->model, &model, &rows, &tokens, &cache, &memory_limit, &threads))
        return NULL;
    const int cache_type = dtype_of(cache, SKV_F16);
    if (cache_type < 0) return NULL;
    if (rows < 1 || tokens < rows || threads < 1 || threads > 1024 || memory_limit < 1) {
        PyErr_Format(PyExc_ValueError, "rows %d, tokens %d, threads %d, memory_limit %zd: each must be positive, tokens at least rows, threads at most 1024",
                     rows, tokens, threads, memory_limit);
        return NULL;
    }
    skv_error error;
    skv_model *core = ((py_model *)model)->model;
    if (skv_model_ready(core, &error)) return raise(PyType_GetModule(type), &error);
    py_session *self = (py_session *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = (py_model *)Py_NewRef(model);
    self->session = skv_session_new(core, (skv_dtype)cache_type, (size_t)rows, (size_t)tokens, (size_t)memory_limit, threads, &error);
    if (self->session) return (PyObject *)self;
    raise(PyType_GetModule(type), &error);
    Py_DECREF(self);
    return NULL;
}

static void session_dealloc(PyObject *object) {
    py_session *self = (py_session *)object;
    PyTypeObject *type = Py_TYPE(object);
    skv_session_free(self->session);
    Py_XDECREF(self->model);
    type->tp_free(object);
    Py_DECREF(type);
}

/* True, with an exception set, while another thread is inside this session. */
static int in_use(py_session *self) {
    if (self->busy) PyErr_SetString(PyExc_RuntimeError, "this session is in use by another thread");
    return self->busy;
}

static PyObject *session_open(PyObject *object, PyObject *capacity) {
    py_session *self = (py_session *)object;
    const long n = PyLong_AsLong(capacity);
    if (PyErr_Occurred() || in_use(self)) return NULL;
    skv_error error;
    int32_t row;
    if (skv_row_open(self->session, n > INT32_MAX ? INT32_MAX : n < 0 ? 0 : (int32_t)n, &row, &error)) return raise(module_of(object), &error);
    return PyLong_FromLong(row);
}

static PyObject *session_close(PyObject *object, PyObject *row) {
    py_session *self = (py_session *)object;
    const long r = PyLong_AsLong(row);
    if (PyErr_Occurred() || in_use(self)) return NULL;
    if (r < 0 || (size_t)r >= self->session->n_rows || !self->session->rows[r].open) return PyErr_Format(PyExc_ValueError, "row %ld is not open", r);
    skv_row_close(self->session, (int32_t)r);
    Py_RETURN_NONE;
}

static PyObject *session_forward(PyObject *object, PyObject *args) {
    py_session *self = (py_session *)object;
    Py_buffer spans, tokens, logits;
    int every;
    if (!PyArg_ParseTuple(args, "y*y*w*p", &spans, &tokens, &logits, &every)) return NULL;
    PyObject *result = NULL;
    const skv_span *span = spans.buf;
    const size_t n_spans = (size_t)spans.len / sizeof *span, n_tokens = (size_t)tokens.len / sizeof(int32_t);
    size_t sum = 0;
    for (size_t i = 0; i < n_spans; i++) sum += span[i].n > 0 ? (size_t)span[i].n : 0;
    if (sum != n_tokens || (size_t)logits.len != (every ? n_tokens : n_spans) * (size_t)self->model->model->config.vocab * sizeof(float)) {
        PyErr_Format(PyExc_ValueError, "spans of %zu tokens, %zu token ids, %zd bytes of logits do not fit together", sum, n_tokens, logits.len);
        goto cleanup;
    }
    if (in_use(self)) goto cleanup;
    skv_error error;
    skv_status status;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS status = skv_forward(self->session, span, n_spans, tokens.buf, every != 0, logits.buf, &error);
    Py_END_ALLOW_THREADS self->busy = 0;
    result = status ? raise(module_of(object), &error) : Py_NewRef(Py_None);
cleanup:
    PyBuffer_Release(&spans);
    PyBuffer_Release(&tokens);
    PyBuffer_Release(&logits);
    return result;
}

static PyObject *session_ledger(PyObject *object, PyObject *Py_UNUSED(unused)) {
    const skv_session *s = ((py_session *)object)->session;
    const size_t page = s->cache.shape.page_bytes;
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:K}", "live_bytes", (Py_ssize_t)((s->cache.n_pages - s->cache.n_free) * page), "reserved_bytes",
                         (Py_ssize_t)(s->cache.n_reserved * page), "pool_bytes", (Py_ssize_t)(s->cache.n_pages * page), "heap_bytes",
                         (Py_ssize_t)s->heap.live_bytes, "n_allocator_calls", (unsigned long long)s->heap.n_calls);
}

static PyMethodDef session_methods[] = {
    {"open", session_open, METH_O, "open(capacity) -> row, with cache for that many tokens set aside."},
    {"close", session_close, METH_O, "close(row): its pages go back to the pool."},
    {"forward", session_forward, METH_VARARGS,
     "forward(spans, tokens, logits, every): spans [n, 2] int32 (row, number of tokens), tokens [n_tokens] int32, logits float32\n"
     "[n_tokens, vocab] to be filled if every, else [n, vocab], those of each span's last token."},
    {"ledger", session_ledger, METH_NOARGS, "ledger() -> dict of the session's bytes."},
    {0},
};
static PyType_Slot session_slots[] = {{Py_tp_new, session_new}, {Py_tp_dealloc, session_dealloc}, {Py_tp_methods, session_methods},
                                      {Py_tp_doc, "Session(model, rows=1, tokens=512, cache='f32', memory_limit=…, threads=1): rows in flight."}, {0}};
static PyType_Spec session_spec = {"skipkv._skipkv.Session", sizeof(py_session), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, session_slots};

static PyMethodDef methods[] = {
    {"families", families, METH_NOARGS, "families() -> dict: model families and what distinguishes them."},
    {"tensors", tensors, METH_O, "tensors(config) -> list of (name, shape, is_matrix) that a checkpoint of this configuration holds."},
    {"variants", variants, METH_NOARGS, "variants() -> dict: CPU variants, best first, and whether this machine runs each."},
    {0},
};

static int module_exec(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    state->errors = PyImport_ImportModule("skipkv.errors");
    if (!state->errors) return -1;
    state->model = (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
    if (!state->model || PyModule_AddType(module, state->model)) return -1;
    PyObject *session = PyType_FromModuleAndSpec(module, &session_spec, NULL);
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
    PyModuleDef_HEAD_INIT,
    .m_name = "skipkv._skipkv",
    .m_size = sizeof(module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__skipkv(void) { return PyModuleDef_Init(&definition); }
