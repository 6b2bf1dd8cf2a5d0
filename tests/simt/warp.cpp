/* Warp collectives, tensor-core fragments and asynchronous copies: what the lanes of a warp do together. */
#include <string.h>

#include <algorithm>

#include "threads.h"

namespace simt {

namespace {

constexpr unsigned MAX_COPIES = 512;

struct {
    unsigned group;
    Copy copy;
} copies[MAX_THREADS][MAX_COPIES]; // rings of those that are not done

uint64_t warp_sync[LAPS][MAX_THREADS]; // what __syncwarp orders, by the lowest lane

/* Calls f(lane, thread) for the lanes of a mask. */
template <class F> void each(const Warp &warp, unsigned mask, F f) {
    for (unsigned left = mask; left; left &= left - 1) f(__builtin_ctz(left), *warp.lanes[__builtin_ctz(left)]);
}

unsigned source_lane(const Thread &t) {
    const unsigned width = static_cast<unsigned>(t.width), base = t.lane & ~(width - 1);
    if (t.op == SHFL) return base + (t.argument & (width - 1));
    if (t.op == SHFL_UP) return t.lane - base < t.argument ? t.lane : t.lane - t.argument;
    if (t.op == SHFL_DOWN) return t.lane + t.argument >= base + width ? t.lane : t.lane + t.argument;
    return (t.lane ^ t.argument) < base + width ? t.lane ^ t.argument : t.lane;
}

void shuffle(const Warp &warp, unsigned mask) {
    each(warp, mask, [&](int, Thread &t) {
        const unsigned source = source_lane(t);
        if (!(mask >> source & 1))
            fault("thread %u reads lane %u, which does not take part: %s, mask %08x, %s:%d", t.id, source, NAMES[t.op],
                  mask, base_name(t.site.file), t.site.line);
        t.result = warp.lanes[source]->value;
    });
}

void vote(const Warp &warp, unsigned mask, Op op) {
    unsigned ballot = 0;
    each(warp, mask, [&](int lane, Thread &t) { ballot |= static_cast<unsigned>(t.value != 0) << lane; });
    const unsigned result = op == ANY ? ballot != 0 : op == ALL ? ballot == mask : ballot;
    each(warp, mask, [&](int, Thread &t) { t.result = result; });
}

void reduce(const Warp &warp, unsigned mask, Op op) {
    auto total = static_cast<int64_t>(warp.lanes[__builtin_ctz(mask)]->value);
    each(warp, mask & (mask - 1), [&](int, Thread &t) {
        const auto value = static_cast<int64_t>(t.value); // of an int or an unsigned, so this order is right for both
        total = op == REDUCE_ADD ? total + value : op == REDUCE_MIN ? std::min(total, value) : std::max(total, value);
    });
    each(warp, mask, [&](int, Thread &t) { t.result = static_cast<uint64_t>(total); });
}

void match(const Warp &warp, unsigned mask) {
    each(warp, mask, [&](int, Thread &t) {
        t.result = 0;
        each(warp, mask,
             [&](int lane, Thread &other) { t.result |= static_cast<uint64_t>(other.value == t.value) << lane; });
    });
}

float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

/* Fragments of PTX's mma.m16n8k16 for 16-bit types: lane = 4 · group + within. */
void multiply(const Warp &warp) {
    float a[16][16], b[16][8], c[16][8];
    const auto fragments = [&](int lane) { return from_bits<const Fragments *>(warp.lanes[lane]->value); };
    for (int lane = 0; lane < 32; lane++) {
        const Fragments *f = fragments(lane);
        const int group = lane / 4, within = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            const int row = group + i % 2 * 8, column = within + i / 2 * 8;
            a[row][column] = low_bf16(f->a[i]);
            a[row][column + 1] = high_bf16(f->a[i]);
            c[group + i / 2 * 8][within + i % 2] = f->c[i];
        }
        for (int i = 0; i < 2; i++) {
            b[within + i * 8][group] = low_bf16(f->b[i]);
            b[within + i * 8 + 1][group] = high_bf16(f->b[i]);
        }
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) fragments(lane)->d[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void load_matrices(const Warp &warp, bool transposed) {
    uint16_t element[32][8]; // the row that each lane has read
    for (int lane = 0; lane < 32; lane++)
        memcpy(element[lane], &from_bits<Rows *>(warp.lanes[lane]->value)->row, sizeof element[lane]);
    for (int lane = 0; lane < 32; lane++)
        for (int matrix = 0; matrix < 4; matrix++) {
            const int row = lane / 4, column = lane % 4 * 2;
            const auto at = [&](int r, int c) {
                return transposed ? element[matrix * 8 + c][r] : element[matrix * 8 + r][c];
            };
            from_bits<Rows *>(warp.lanes[lane]->value)->r[matrix] =
                at(row, column) | static_cast<uint32_t>(at(row, column + 1)) << 16;
        }
}

void complete(Warp &warp, unsigned mask, const Thread &last) {
    each(warp, mask, [&](int, Thread &t) {
        if (t.mask != last.mask || t.op != last.op || !(t.site == last.site))
            fault("divergent warp collective: thread %u is at %s, mask %08x, %s:%d, thread %u at %s, mask %08x, %s:%d",
                  t.id, NAMES[t.op], t.mask, base_name(t.site.file), t.site.line, last.id, NAMES[last.op], last.mask,
                  base_name(last.site.file), last.site.line);
    });
    if (SHFL <= last.op && last.op <= SHFL_XOR) shuffle(warp, mask);
    if (ANY <= last.op && last.op <= BALLOT) vote(warp, mask, last.op);
    if (REDUCE_ADD <= last.op && last.op <= REDUCE_MAX) reduce(warp, mask, last.op);
    if (last.op == MATCH_ANY) match(warp, mask);
    if (last.op == MMA) multiply(warp);
    if (last.op == LDMATRIX || last.op == LDMATRIX_TRANS) load_matrices(warp, last.op == LDMATRIX_TRANS);
    warp.waiting &= ~mask;
}

} // namespace

uint64_t collective(Op op, unsigned mask, uint64_t value, Site site, unsigned argument, int width) {
    Thread *me = current;
    Warp &warp = *me->warp;
    me->op = op;
    me->site = site;
    me->mask = mask;
    me->argument = argument;
    me->width = width;
    me->value = value;
    me->state = AT_COLLECTIVE;
    if (!(mask >> me->lane & 1)) fault("thread %u is at a collective whose mask lacks its lane %u", me->id, me->lane);
    if (mask & warp.exited) fault("thread %u waits for lanes that have exited: %08x", me->id, mask & warp.exited);
    if (op >= MMA && warp.present != ~0u) fault("thread %u needs a whole warp", me->id);
    mask &= warp.present;
    warp.waiting |= 1u << me->lane;
    uint64_t *sync = &warp_sync[lap][(me->id & ~31u) + static_cast<unsigned>(__builtin_ctz(mask))];
    if (op == SYNCWARP) release(sync);
    if (!(mask & ~warp.waiting)) {
        complete(warp, mask, *me);
        wake(warp, mask);
    }
    wait();
    if (op == SYNCWARP) acquire(sync);
    return me->result;
}

/* ---- asynchronous copies ---- */

void copy_later(Copy copy, Site site) {
    if ((reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from)) % 16)
        fault("thread %u: cudax_copy16 of an address that is not a multiple of 16, %s:%d", current->id,
              base_name(site.file), site.line);
    Thread &me = *current;
    if (me.copies_begun - me.copies_done == MAX_COPIES)
        fault("thread %u has %u copies on their way", me.id, MAX_COPIES);
    copies[me.id][me.copies_begun++ % MAX_COPIES] = {me.group, copy};
}

void commit_copies() { current->group++; }

Copy due_copy(unsigned groups_left) {
    Thread &me = *current;
    const auto &next = copies[me.id][me.copies_done % MAX_COPIES];
    if (me.copies_done == me.copies_begun || next.group + groups_left >= me.group) return {};
    me.copies_done++;
    return next.copy;
}

} // namespace simt
