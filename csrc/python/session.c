#include "binding.h"

typedef struct py_session {
    PyObject_HEAD skv_session *session;
    py_model *model;                /* keeps the weights alive */
    PyObject *budgets, *vocabulary; /* keep arrays alive */
    py_custom custom;
    skv_candidate *candidates; /* [vocab] the sampler's scratch */
    int busy;                  /* a forward runs without the GIL, or what it has left is read */
} py_session;

static PyObject *session_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *module = PyType_GetModule(type), *model, *method_dict = NULL, *vocabulary = Py_None;
    module_state *state = PyModule_GetState(module);
    const char *cache = "f32";
    int rows = 1, tokens = 512, threads = 1, trace = 0, timed = 0;
    Py_ssize_t memory_limit = PY_SSIZE_T_MAX;
    char *names[] = {"model",      "rows",  "tokens", "cache", "memory_limit", "threads", "method",
                     "vocabulary", "trace", "timed",  NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|iisniOOip", names, state->model, &model, &rows, &tokens, &cache,
                                     &memory_limit, &threads, &method_dict, &vocabulary, &trace, &timed))
        return NULL;
    const int cache_type = py_dtype(module, cache, PY_CACHE);
    if (cache_type < 0) return NULL;
    if (rows < 1 || tokens < rows || threads < 1 || threads > SKV_MAX_THREADS || memory_limit < 1 || trace < 0 ||
        trace > SKV_TRACE_SCORES)
        return py_config_error(
            module,
            "rows %d, tokens %d, threads %d, memory_limit %zd, trace %d: each must be positive, tokens at least rows, "
            "threads at most %d, trace at most %d",
            rows, tokens, threads, memory_limit, trace, SKV_MAX_THREADS, SKV_TRACE_SCORES);
    skv_error error;
    skv_model *core = ((py_model *)model)->model;
    const skv_config *c = skv_model_config(core);
    if (py_in_use(((py_model *)model)->busy, "model")) return NULL;
    if (skv_model_ready(core, &error)) return py_raise(module, &error);
    py_session *self = (py_session *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = (py_model *)Py_NewRef(model);
    skv_options options = {.cache_type = (skv_dtype)cache_type,
                           .n_rows = (size_t)rows,
                           .max_tokens = (size_t)tokens,
                           .limit_bytes = (size_t)memory_limit,
                           .n_threads = threads,
                           .trace = (skv_trace_level)trace,
                           .timed = timed != 0};
    if (py_method(module, method_dict, &options.method, &self->custom, &self->budgets) ||
        py_vocabulary(module, vocabulary, &options.vocabulary, c->vocab, &self->vocabulary))
        goto failed;
    if (self->budgets && (PyArray_DIM((PyArrayObject *)self->budgets, 0) != c->n_layers ||
                          PyArray_DIM((PyArrayObject *)self->budgets, 1) != c->n_kv_heads)) {
        py_config_error(module, "budget: expected shape [%d, %d], found [%zd, %zd]", c->n_layers, c->n_kv_heads,
                        (Py_ssize_t)PyArray_DIM((PyArrayObject *)self->budgets, 0),
                        (Py_ssize_t)PyArray_DIM((PyArrayObject *)self->budgets, 1));
        goto failed;
    }
    self->session = skv_session_new(core, &options, &error);
    if (!self->session) {
        py_raise(module, &error);
        goto failed;
    }
    self->candidates = PyMem_Calloc((size_t)c->vocab, sizeof *self->candidates);
    if (self->candidates) return (PyObject *)self;
    PyErr_NoMemory();
failed:
    Py_DECREF(self);
    return NULL;
}

static int session_traverse(PyObject *object, visitproc visit, void *arg) {
    py_session *self = (py_session *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->model);
    Py_VISIT(self->custom.function);
    return 0;
}

static int session_clear(PyObject *object) {
    Py_CLEAR(((py_session *)object)->custom.function);
    return 0;
}

static void session_dealloc(PyObject *object) {
    py_session *self = (py_session *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    PyMem_Free(self->candidates);
    skv_session_free(self->session);
    Py_XDECREF(self->model);
    Py_XDECREF(self->custom.function);
    Py_XDECREF(self->budgets);
    Py_XDECREF(self->vocabulary);
    type->tp_free(object);
    Py_DECREF(type);
}

static int in_use(py_session *self) { return py_in_use(self->busy, "session"); }

/* Whether this row is open and the session idle; false with an exception set. */
static bool is_open(py_session *self, int row) {
    if (in_use(self)) return false;
    if (skv_row_is_open(self->session, row)) return true;
    py_config_error(py_module_of((PyObject *)self), "row %d is not open", row);
    return false;
}

static const skv_config *config_of(const py_session *self) { return skv_model_config(self->model->model); }

/* None, or (vector [hidden], layer, alpha, gamma, alpha_max, scope). *held: a new reference to what the vector is
 * borrowed from. */
static int read_steering(py_session *self, PyObject *tuple, skv_steering *steering, PyObject **held) {
    PyObject *module = py_module_of((PyObject *)self), *vector;
    const char *scope;
    if (tuple == Py_None) return 0;
    if (!PyArg_ParseTuple(tuple, "Oifffs", &vector, &steering->layer, &steering->alpha, &steering->gamma,
                          &steering->alpha_max, &scope))
        return -1;
    int found = 0;
    while (found < SKV_N_SCOPES && strcmp(skv_scope_names[found], scope)) found++;
    if (found == SKV_N_SCOPES)
        return py_config_error(module, "scope is \"%.40s\"; allowed: think, generation, all", scope), -1;
    steering->scope = (skv_scope)found;
    PyArrayObject *array =
        py_array(module, vector, "steering vector", NPY_FLOAT, 1, (npy_intp[]){config_of(self)->hidden});
    if (!array) return -1;
    steering->vector = PyArray_DATA(array);
    *held = (PyObject *)array;
    return 0;
}

static PyObject *session_open(PyObject *object, PyObject *args, PyObject *kwargs) {
    py_session *self = (py_session *)object;
    int capacity, n_prompt = 0, reserve = 0;
    long long prompt = 0, sample = 0;
    PyObject *steering = Py_None, *held = NULL, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "i|iLLOi",
            (char *[]){"capacity", "n_prompt", "prompt", "sample", "steering", "reserve", NULL}, &capacity, &n_prompt,
            &prompt, &sample, &steering, &reserve))
        return NULL;
    skv_row_options options = {.capacity = capacity,
                               .n_prompt = n_prompt ? n_prompt : capacity,
                               .reserve = reserve,
                               .sequence = {prompt, sample}};
    skv_error error;
    int32_t row;
    if (read_steering(self, steering, &options.steering, &held)) return NULL;
    if (!in_use(self))
        result = skv_row_open(self->session, &options, &row, &error) ? py_raise(py_module_of(object), &error)
                                                                     : PyLong_FromLong(row);
    Py_XDECREF(held);
    return result;
}

static PyObject *session_fork(PyObject *object, PyObject *args) {
    py_session *self = (py_session *)object;
    int from, capacity;
    long long sample;
    skv_error error;
    int32_t row;
    if (!PyArg_ParseTuple(args, "iiL", &from, &capacity, &sample) || !is_open(self, from)) return NULL;
    return skv_row_fork(self->session, from, capacity, sample, &row, &error) ? py_raise(py_module_of(object), &error)
                                                                             : PyLong_FromLong(row);
}

static PyObject *session_close(PyObject *object, PyObject *row) {
    py_session *self = (py_session *)object;
    const int r = (int)PyLong_AsLong(row);
    if (PyErr_Occurred() || !is_open(self, r)) return NULL;
    skv_row_close(self->session, r);
    Py_RETURN_NONE;
}

static PyObject *session_chunk(PyObject *object, PyObject *args) {
    py_session *self = (py_session *)object;
    int row, n;
    if (!PyArg_ParseTuple(args, "ii", &row, &n) || !is_open(self, row)) return NULL;
    return PyLong_FromLong(skv_row_chunk(self->session, row, n));
}

static PyObject *session_row_bytes(PyObject *object, PyObject *args) {
    py_session *self = (py_session *)object;
    int capacity, n_prompt;
    if (!PyArg_ParseTuple(args, "ii", &capacity, &n_prompt) || in_use(self)) return NULL;
    return PyLong_FromSize_t(skv_row_bytes(self->session, capacity, n_prompt));
}

static PyObject *session_fixed_bytes(PyObject *object, PyObject *args) {
    py_session *self = (py_session *)object;
    int capacity, n_prompt;
    if (!PyArg_ParseTuple(args, "ii", &capacity, &n_prompt) || in_use(self)) return NULL;
    return PyLong_FromSize_t(skv_session_bytes(self->session, capacity, n_prompt));
}

static PyObject *session_forward(PyObject *object, PyObject *args, PyObject *kwargs) {
    py_session *self = (py_session *)object;
    PyObject *module = py_module_of(object), *span_object, *token_object, *logit_object = Py_None,
             *layer_object = Py_None, *state_object = Py_None, *best_object = Py_None, *result = NULL;
    PyArrayObject *spans = NULL, *tokens = NULL, *logits = NULL, *layers = NULL, *states = NULL, *best = NULL;
    int every = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OpOOO",
                                     (char *[]){"spans", "tokens", "logits", "every", "layers", "states", "best", NULL},
                                     &span_object, &token_object, &logit_object, &every, &layer_object, &state_object,
                                     &best_object))
        return NULL;
    const skv_config *c = config_of(self);
    spans = py_array(module, span_object, "spans", NPY_INT32, 2, (npy_intp[]){-1, 2});
    tokens = spans ? py_array(module, token_object, "tokens", NPY_INT32, 1, (npy_intp[]){-1}) : NULL;
    if (!tokens) goto cleanup;
    const skv_span *span = PyArray_DATA(spans);
    const npy_intp n_spans = PyArray_DIM(spans, 0), n_tokens = PyArray_DIM(tokens, 0);
    npy_intp sum = 0;
    for (npy_intp i = 0; i < n_spans; i++) sum += span[i].n > 0 ? span[i].n : 0;
    if (sum != n_tokens) {
        py_config_error(module, "spans of %zd tokens, but %zd token ids", (Py_ssize_t)sum, (Py_ssize_t)n_tokens);
        goto cleanup;
    }
    const npy_intp shape[] = {every ? n_tokens : n_spans, c->vocab};
    if (logit_object != Py_None && !(logits = py_output(module, logit_object, "logits", NPY_FLOAT, 2, shape)))
        goto cleanup;
    if (best_object != Py_None && !(best = py_output(module, best_object, "best", NPY_INT32, 1, shape))) goto cleanup;
    skv_capture capture = {0};
    if (layer_object != Py_None) {
        if (!(layers = py_array(module, layer_object, "layers", NPY_INT32, 1, (npy_intp[]){-1}))) goto cleanup;
        if (!(states = py_output(module, state_object, "states", NPY_FLOAT, 3,
                                 (npy_intp[]){PyArray_DIM(layers, 0), n_tokens, c->hidden})))
            goto cleanup;
        capture = (skv_capture){PyArray_DATA(layers), (size_t)PyArray_DIM(layers, 0), PyArray_DATA(states)};
    }
    if (in_use(self)) goto cleanup;
    skv_error error;
    skv_status status;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS status = skv_forward(self->session, span, (size_t)n_spans, PyArray_DATA(tokens), every != 0,
                                                logits ? PyArray_DATA(logits) : NULL, best ? PyArray_DATA(best) : NULL,
                                                layers ? &capture : NULL, &error);
    Py_END_ALLOW_THREADS const bool raised = status && self->custom.type;
    if (raised) {
        PyErr_Restore(self->custom.type, self->custom.value, self->custom.traceback);
        self->custom.type = self->custom.value = self->custom.traceback = NULL;
    } else if (status) {
        py_raise(module, &error);
    } else {
        result = PyList_New(0);
        for (npy_intp t = 0; result && t < n_tokens; t++) {
            float alpha;
            if (!skv_session_steered(self->session, (size_t)t, &alpha)) continue;
            PyObject *pair = Py_BuildValue("nd", (Py_ssize_t)t, (double)alpha);
            if (!pair || PyList_Append(result, pair)) Py_CLEAR(result);
            Py_XDECREF(pair);
        }
        if (!result) skv_end_rows(self->session, span, (size_t)n_spans);
    }
    self->busy = 0;
cleanup:
    Py_XDECREF(spans);
    Py_XDECREF(tokens);
    Py_XDECREF(logits);
    Py_XDECREF(layers);
    Py_XDECREF(states);
    Py_XDECREF(best);
    return result;
}

static PyObject *session_sample(PyObject *object, PyObject *args) {
    py_session *self = (py_session *)object;
    PyObject *module = py_module_of(object), *logit_object, *sequence_object, *tokens = NULL;
    skv_sampling sampling;
    double temperature, top_p, min_p;
    int top_k;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "OOKdidd", &logit_object, &sequence_object, &seed, &temperature, &top_k, &top_p,
                          &min_p) ||
        in_use(self))
        return NULL;
    const npy_intp vocab = config_of(self)->vocab;
    PyArrayObject *logits = py_borrowed(module, logit_object, "logits", NPY_FLOAT, 2, (npy_intp[]){-1, vocab});
    if (!logits) return NULL;
    PyArrayObject *sequences =
        py_array(module, sequence_object, "sequences", NPY_INT64, 2, (npy_intp[]){PyArray_DIM(logits, 0), 3});
    if (sequences) tokens = PyArray_SimpleNew(1, PyArray_DIMS(logits), NPY_INT32);
    sampling = (skv_sampling){
        .temperature = (float)temperature, .top_k = top_k, .top_p = (float)top_p, .min_p = (float)min_p, .seed = seed};
    for (npy_intp i = 0; tokens && i < PyArray_DIM(logits, 0); i++)
        *(int32_t *)PyArray_GETPTR1((PyArrayObject *)tokens, i) =
            skv_sample(PyArray_GETPTR2(logits, i, 0), (size_t)vocab, &sampling,
                       (const int64_t *)PyArray_GETPTR2(sequences, i, 0), self->candidates);
    Py_DECREF(logits);
    Py_XDECREF(sequences);
    return tokens;
}

static PyObject *session_brake(PyObject *object, PyObject *row) {
    py_session *self = (py_session *)object;
    const int index = (int)PyLong_AsLong(row);
    if (PyErr_Occurred() || !is_open(self, index)) return NULL;
    skv_row_brake(self->session, index);
    Py_RETURN_NONE;
}

static PyObject *session_state(PyObject *object, PyObject *row) {
    py_session *self = (py_session *)object;
    const int index = (int)PyLong_AsLong(row);
    if (PyErr_Occurred() || !is_open(self, index)) return NULL;
    const skv_row_state s = skv_row_state_of(self->session, index);
    return Py_BuildValue("{s:i,s:i,s:n,s:n,s:n,s:i,s:K,s:K,s:n,s:n,s:i,s:i,s:i,s:i,s:i}", "n_tokens", s.n_tokens,
                         "n_prompt", s.n_prompt, "slots", (Py_ssize_t)s.n_slots, "live_bytes", (Py_ssize_t)s.live_bytes,
                         "peak_bytes", (Py_ssize_t)s.peak_bytes, "compactions", s.n_compactions, "evicted",
                         (unsigned long long)s.n_evicted, "pairs", (unsigned long long)s.n_pairs, "sentences",
                         (Py_ssize_t)s.n_sentences, "flagged", (Py_ssize_t)s.n_flagged, "thoughts", s.n_thoughts,
                         "thinking_tokens", s.n_thinking, "answer_tokens", s.n_answer, "repeating", s.n_repeating,
                         "steered", s.n_steered);
}

static PyObject *session_positions(PyObject *object, PyObject *args) {
    py_session *self = (py_session *)object;
    int row, layer, head;
    if (!PyArg_ParseTuple(args, "iii", &row, &layer, &head) || !is_open(self, row)) return NULL;
    const skv_config *c = config_of(self);
    if (layer < 0 || layer >= c->n_layers || head < 0 || head >= c->n_kv_heads)
        return py_config_error(py_module_of(object), "layer %d, head %d: there are %d and %d", layer, head, c->n_layers,
                               c->n_kv_heads);
    const size_t n = skv_row_positions(self->session, row, (size_t)layer, (size_t)head, NULL, 0);
    PyObject *array = PyArray_SimpleNew(1, ((npy_intp[]){(npy_intp)n}), NPY_INT32);
    if (array)
        skv_row_positions(self->session, row, (size_t)layer, (size_t)head, PyArray_DATA((PyArrayObject *)array), n);
    return array;
}

/* (first, last, closed, thought, λ, repeats) of every finished sentence, and their vectors [n, hidden], NaN where
 * freed. */
static PyObject *session_sentences(PyObject *object, PyObject *args) {
    py_session *self = (py_session *)object;
    int row, with_vectors = 0;
    if (!PyArg_ParseTuple(args, "i|p", &row, &with_vectors) || !is_open(self, row)) return NULL;
    self->busy = 1; /* a garbage collection may run any code */
    const npy_intp n = (npy_intp)skv_row_state_of(self->session, row).n_sentences,
                   shape[] = {n, config_of(self)->hidden};
    PyObject *list = PyList_New(n), *both = NULL;
    PyObject *vectors = with_vectors ? PyArray_SimpleNew(2, shape, NPY_FLOAT) : Py_NewRef(Py_None);
    for (npy_intp i = 0; list && vectors && i < n; i++) {
        float *vector = with_vectors ? PyArray_GETPTR2((PyArrayObject *)vectors, i, 0) : NULL;
        const skv_sentence s = skv_row_sentence(self->session, row, (size_t)i, vector);
        PyObject *item = Py_BuildValue("iiiidi", s.first, s.last, s.closed, s.thought, (double)s.lambda, s.repeats);
        if (!item) goto cleanup;
        PyList_SET_ITEM(list, i, item);
    }
    if (list && vectors) both = PyTuple_Pack(2, list, vectors);
cleanup:
    self->busy = 0;
    Py_XDECREF(list);
    Py_XDECREF(vectors);
    return both;
}

/* One record as (row, step, layer, head, n_before, kept, scores): scores a dict of [n_candidates] arrays, or None. */
static PyObject *record_tuple(const skv_record *record, const char *bytes, const char **end) {
    PyObject *kept = py_copy(bytes, NPY_INT32, 1, (npy_intp[]){record->n_kept}), *scores = Py_NewRef(Py_None);
    const npy_intp n = record->n_candidates;
    bytes += sizeof(int32_t) * (size_t)record->n_kept;
    if (record->scored) Py_SETREF(scores, PyDict_New());
    for (size_t term = 0; record->scored && term <= SKV_N_TERMS; term++) { /* the score stands behind the terms */
        if (term < SKV_N_TERMS && !(record->given & 1u << term)) continue;
        const char *name = term < SKV_N_TERMS ? skv_term_names[term] : "score";
        if (scores && py_set(scores, name, py_copy(bytes, NPY_FLOAT, 1, &n))) Py_CLEAR(scores);
        bytes += sizeof(float) * (size_t)n;
    }
    *end = bytes;
    return Py_BuildValue("iiiiiNN", record->row, record->step, record->layer, record->head, record->n_before, kept,
                         scores);
}

static PyObject *session_trace(PyObject *object, PyObject *Py_UNUSED(unused)) {
    py_session *self = (py_session *)object;
    if (in_use(self)) return NULL;
    size_t n_bytes;
    self->busy = 1; /* a garbage collection may run any code */
    const char *bytes = skv_session_trace(self->session, &n_bytes);
    PyObject *list = PyList_New(0);
    for (const char *at = bytes; list && at < bytes + n_bytes;) {
        skv_record record;
        memcpy(&record, at, sizeof record);
        PyObject *tuple = record_tuple(&record, at + sizeof record, &at);
        if (!tuple || PyList_Append(list, tuple)) Py_CLEAR(list);
        Py_XDECREF(tuple);
    }
    if (list) skv_session_drop_trace(self->session);
    self->busy = 0;
    return list;
}

static PyObject *session_ledger(PyObject *object, PyObject *Py_UNUSED(unused)) {
    if (in_use((py_session *)object)) return NULL;
    const skv_ledger l = skv_session_ledger(((py_session *)object)->session);
    const struct {
        const char *name;
        size_t value;
    } bytes[] = {{"live_bytes", l.live_bytes},         {"reserved_bytes", l.reserved_bytes},
                 {"pool_bytes", l.pool_bytes},         {"peak_bytes", l.peak_bytes},
                 {"page_bytes", l.page_bytes},         {"ring_bytes", l.ring_bytes},
                 {"sentence_bytes", l.sentence_bytes}, {"workspace_bytes", l.workspace_bytes},
                 {"heap_bytes", l.heap_bytes},         {"weight_bytes", l.weight_bytes}};
    PyObject *ledger = Py_BuildValue("{s:K,s:d}", "n_allocator_calls", (unsigned long long)l.n_allocator_calls,
                                     "evict_seconds", l.evict_seconds);
    for (size_t i = 0; ledger && i < sizeof bytes / sizeof *bytes; i++) {
        PyObject *value = PyLong_FromSize_t(bytes[i].value);
        if (!value || PyDict_SetItemString(ledger, bytes[i].name, value)) Py_CLEAR(ledger);
        Py_XDECREF(value);
    }
    return ledger;
}

static PyObject *session_seconds(PyObject *object, PyObject *Py_UNUSED(unused)) {
    const double *seconds = skv_session_seconds(((py_session *)object)->session);
    PyObject *dict = PyDict_New();
    const char *name;
    for (size_t i = 0; dict && (name = skv_op_name(i)); i++)
        if (py_set(dict, name, PyFloat_FromDouble(seconds[i]))) Py_CLEAR(dict);
    return dict;
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void)) function, METH_VARARGS | METH_KEYWORDS
static PyMethodDef session_methods[] = {
    {"open", KEYWORDS(session_open),
     "open(capacity, n_prompt=capacity, prompt=0, sample=0, steering=None, reserve=0) -> row, with cache for its worst "
     "case set aside.\n"
     "steering: (vector [hidden], layer, alpha, gamma, alpha_max, scope). reserve: slots taken off every budget."},
    {"fork", session_fork, METH_VARARGS, "fork(row, capacity, sample) -> a row that holds what that row holds."},
    {"close", session_close, METH_O, "close(row): its pages go back to the pool."},
    {"chunk", session_chunk, METH_VARARGS, "chunk(row, n) -> how many of its next n tokens may be fed at once."},
    {"row_bytes", session_row_bytes, METH_VARARGS,
     "row_bytes(capacity, n_prompt) -> bytes under the memory limit of such a row, its worst case."},
    {"fixed_bytes", session_fixed_bytes, METH_VARARGS,
     "fixed_bytes(capacity, n_prompt) -> those of the session beside its rows, none longer than this one."},
    {"forward", KEYWORDS(session_forward),
     "forward(spans, tokens, logits=None, every=False, layers=None, states=None, best=None) -> list of (index of a "
     "steered token, its α).\n"
     "spans [n, 2] int32 (row, number of tokens), tokens [n_tokens] int32, logits float32 [n_tokens, vocab] to be "
     "filled if every, else "
     "[n, vocab],\n"
     "those of each span's last token; best int32 [as logits], with logits: filled with the ids of the largest, ties "
     "to the lower, −1 where it is not finite,\n"
     "and logits with anything; states float32 [n_layers, n_tokens, hidden]: those entering the blocks "
     "`layers`, or after the final "
     "norm."},
    {"sample", session_sample, METH_VARARGS,
     "sample(logits [n, vocab], sequences [n, 3], seed, temperature, top_k, top_p, min_p) -> tokens [n] int32."},
    {"brake", session_brake, METH_O, "brake(row): raises its steering to alpha_max."},
    {"state", session_state, METH_O, "state(row) -> dict of its counts."},
    {"positions", session_positions, METH_VARARGS, "positions(row, layer, head) -> int32 [n_slots]."},
    {"sentences", session_sentences, METH_VARARGS,
     "sentences(row, vectors=False) -> (list of (first, last, closed, thought, lambda, repeats), vectors [n, hidden] "
     "or None)."},
    {"trace", session_trace, METH_NOARGS,
     "trace() -> the records since the last call: (row, step, layer, head, n_before, kept, scores)."},
    {"ledger", session_ledger, METH_NOARGS, "ledger() -> dict of the session's bytes."},
    {"seconds", session_seconds, METH_NOARGS, "seconds() -> dict of the time that each op of a timed session took."},
    {0},
};
static PyType_Slot session_slots[] = {{Py_tp_new, session_new},
                                      {Py_tp_dealloc, session_dealloc},
                                      {Py_tp_traverse, session_traverse},
                                      {Py_tp_clear, session_clear},
                                      {Py_tp_methods, session_methods},
                                      {Py_tp_doc,
                                       "Session(model, rows=1, tokens=512, cache='f32', memory_limit=…, "
                                       "threads=1, method=None, vocabulary=None, trace=0, timed=False): rows in "
                                       "flight."},
                                      {0}};
PyType_Spec py_session_spec = {"skipkv._skipkv.Session", sizeof(py_session), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC, session_slots};
