/* Status codes and the one sentence that explains a failure. Every fallible function of the core returns a skv_status
 * and fills the caller's skv_error; nothing prints, exits or aborts. */
#ifndef SKV_ERROR_H
#define SKV_ERROR_H

typedef enum skv_status {
    SKV_OK = 0,
    SKV_CHECKPOINT, /* a weight is missing, surplus or of the wrong shape or type */
    SKV_CONFIG,     /* a parameter is out of range */
    SKV_CAPACITY,   /* does not fit: into a limit, or into memory */
    SKV_BACKEND,    /* a device or its driver failed */
    SKV_CALLER,     /* a function of the caller's failed, and the caller knows why */
} skv_status;

typedef struct skv_error {
    skv_status code;
    char text[512];
} skv_error;

/* Fills *error with code and a formatted sentence; returns code, so that a caller can write `return skv_fail(…)`. */
skv_status skv_fail(skv_error *error, skv_status code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
