#include "error.h"

#include <stdarg.h>
#include <stdio.h>

skv_status skv_fail(skv_error *error, skv_status code, const char *format, ...) {
    error->code = code;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return code;
}
