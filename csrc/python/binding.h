/* The Python binding: the only files that include Python.h and NumPy. Arrays come in checked for type, shape and order,
 * and copied, as another thread or a custom score may write to the caller's between a check and a use. */
#ifndef SKV_BINDING_H
#define SKV_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL skv_ARRAY_API
#ifndef SKV_MODULE
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../skipkv.h"

typedef struct module_state {
    PyObject *errors; /* module skipkv.errors */
    PyTypeObject *model;
} module_state;

typedef struct py_model {
    PyObject_HEAD skv_model *model;
    int busy; /* a tensor is bound without the GIL */
} py_model;

extern PyType_Spec py_model_spec, py_session_spec;

/* The one funnel from status codes to exceptions; one that is set already stays. Returns NULL. */
PyObject *py_raise(PyObject *module, const skv_error *error);

/* As py_raise, for bad arguments that only the binding can see. */
PyObject *py_config_error(PyObject *module, const char *format, ...);

PyObject *py_module_of(PyObject *self);

/* busy; where it is not 0, with an exception set: another thread is inside. Asked after all that runs Python code. */
int py_in_use(int busy, const char *what);

/* The object's copy as a C-contiguous array of this type and number of dimensions, shape[i] −1 where any size does.
 * NULL with a ConfigError that names it. */
PyArrayObject *py_array(PyObject *module, PyObject *object, const char *name, int type, int n_dims,
                        const npy_intp *shape);

/* As py_array, but the same array where it is one already: for large data whose values are not relied on. */
PyArrayObject *py_borrowed(PyObject *module, PyObject *object, const char *name, int type, int n_dims,
                           const npy_intp *shape);

/* As py_array, but to be written to: never a copy. */
PyArrayObject *py_output(PyObject *module, PyObject *object, const char *name, int type, int n_dims,
                         const npy_intp *shape);

/* A new array with a copy of the data. */
PyObject *py_copy(const void *data, int type, int n_dims, const npy_intp *shape);

/* The type of this name that is allowed for its use, −1 with a ConfigError. */
typedef enum py_use { PY_STORED, PY_WEIGHTS, PY_CACHE } py_use;

bool py_dtype_allowed(int type, py_use use);
int py_dtype(PyObject *module, const char *name, py_use use);

/* dict[name] = value, a new reference that is taken over, NULL included; −1 with an exception set. */
int py_set(PyObject *dict, const char *name, PyObject *value);

/* What a Python method needs and is: the bits of policies.h by name. */
PyObject *py_needs(void);

/* Python's side of a method: {"name", "budget" [n_layers, n_kv_heads] int32, parameters by name, "protect": (first,
 * prompt), "allocate": "head" or "layer", "evict", "compat", "score", "needs"}, all optional, or NULL. What the
 * arrays are borrowed from is held in `held`, a new reference. */
typedef struct py_custom {
    PyObject *module, *function;        /* the latter a new reference */
    PyObject *type, *value, *traceback; /* what the function raised */
} py_custom;

int py_method(PyObject *module, PyObject *dict, skv_method *method, py_custom *custom, PyObject **held);

/* (flags uint8 [vocab], runs int32 [n, 3], bytes uint8 [n_bytes], starts int64 [vocab + 1]) or None; held as above. */
int py_vocabulary(PyObject *module, PyObject *tuple, skv_vocabulary *vocabulary, npy_intp vocab, PyObject **held);

/* Functions on arrays (arrays.c). */
PyObject *py_methods(PyObject *module, PyObject *unused);
PyObject *py_check_method(PyObject *module, PyObject *args);
PyObject *py_method_needs(PyObject *module, PyObject *dict);
PyObject *py_select(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_segment(PyObject *module, PyObject *args);
PyObject *py_flag_repeats(PyObject *module, PyObject *args);

#endif
