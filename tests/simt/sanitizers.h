/* What the runtime's own sources tell the sanitizers; nothing where none is built in. */
#pragma once

#include <stddef.h>

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_MSAN
#include <sanitizer/msan_interface.h>
#endif
#ifdef SIMT_TSAN
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *object);
void __tsan_release(void *object);
void __tsan_java_alloc(size_t memory, size_t bytes);
void __tsan_java_free(size_t memory, size_t bytes);
}
#endif

namespace simt {

/* A stack is left for another one, and arrived at; `bottom` and `bytes` of the stack before come back. */
inline void leave_stack([[maybe_unused]] void **fake, [[maybe_unused]] const void *bottom,
                        [[maybe_unused]] size_t bytes) {
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(fake, bottom, bytes);
#endif
}
inline void enter_stack([[maybe_unused]] void *fake, [[maybe_unused]] const void **bottom,
                        [[maybe_unused]] size_t *bytes) {
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake, bottom, bytes);
#endif
}

inline void allow([[maybe_unused]] const void *memory, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_ASAN
    __asan_unpoison_memory_region(memory, bytes);
#endif
}
inline void forbid([[maybe_unused]] const void *memory, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_ASAN
    __asan_poison_memory_region(memory, bytes);
#endif
}

/* The memory counts as not initialised. */
inline void uninitialise([[maybe_unused]] void *memory, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_MSAN
    __msan_allocated_memory(memory, bytes);
#endif
}

/* ThreadSanitizer's threads. A switch orders nothing; what releases an object comes before what acquires it later. */
inline void *this_thread() {
#ifdef SIMT_TSAN
    return __tsan_get_current_fiber();
#else
    return nullptr;
#endif
}
inline void make_thread([[maybe_unused]] void **thread) {
#ifdef SIMT_TSAN
    if (!*thread) *thread = __tsan_create_fiber(0);
#endif
}
inline void switch_thread([[maybe_unused]] void *thread) {
#ifdef SIMT_TSAN
    __tsan_switch_to_fiber(thread, 1);
#endif
}
inline void acquire([[maybe_unused]] void *object) {
#ifdef SIMT_TSAN
    __tsan_acquire(object);
#endif
}
inline void release([[maybe_unused]] void *object) {
#ifdef SIMT_TSAN
    __tsan_release(object);
#endif
}

/* Nobody has touched the memory. */
inline void forget_accesses([[maybe_unused]] void *memory, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_TSAN
    __tsan_java_free(reinterpret_cast<size_t>(memory), bytes);
    __tsan_java_alloc(reinterpret_cast<size_t>(memory), bytes);
#endif
}

} // namespace simt
