/* Ops that work element by element, and the vectors of sentences.
 *
 * kernel            grid, block                      moves                           why
 * rmsnorm_rows      [rows], 256                      reads x twice, writes once      a hidden state is wide: a block
 * rmsnorm_heads     [rows / 8], 256                  the same                        a head is narrow: a warp
 * rope_kernel       [tokens, pairs / 256], 256       reads and writes x              a thread turns a pair
 * steer_kernel      [tokens, hidden / 256], 256      x of steered tokens
 * silu_kernel, add_kernel, last_kernel [n / 256], 256 one pass over their operands
 * sentence_kernel   [parts], 256                     reads x once                    tokens of a row come in order
 * similar_kernel    [pairs / 8], 256                 reads the vectors of a pair     a warp a pair
 */
#include "cuda.cuh"

static __global__ void rmsnorm_rows(const float *x, const float *w, float eps, size_t dim, float *y) {
    __shared__ float scratch[WARPS];
    x += blockIdx.x * dim, y += blockIdx.x * dim;
    float squares = 0;
    for (size_t i = threadIdx.x; i < dim; i += THREADS) squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / float(dim) + eps);
    for (size_t i = threadIdx.x; i < dim; i += THREADS) y[i] = x[i] * scale * w[i];
}

static __global__ void rmsnorm_heads(const float *x, const float *w, float eps, size_t n, size_t dim, float *y) {
    const size_t row = size_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= n) return; /* whole warps, and no barrier follows */
    x += row * dim, y += row * dim;
    float squares = 0;
    for (size_t i = threadIdx.x % WARP; i < dim; i += WARP) squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(warp_sum(squares) / float(dim) + eps);
    for (size_t i = threadIdx.x % WARP; i < dim; i += WARP) y[i] = x[i] * scale * w[i];
}

void cu_rmsnorm(skv_device *base, const float *x, const float *w, float eps, size_t n, size_t dim, float *y) {
    cu_device *d = cu_of(base);
    if (dim <= 512)
        CU_LAUNCH(d, rmsnorm_heads, cu_blocks(n, WARPS), THREADS, 0, x, w, eps, n, dim, y);
    else
        CU_LAUNCH(d, rmsnorm_rows, unsigned(n), THREADS, 0, x, w, eps, dim, y);
}

/* x [n_tokens, n_heads, head_dim]: element i is paired with i + head_dim / 2. */
static __global__ void rope_kernel(float *x, uint32_t n_heads, uint32_t half, const float *cosine, const float *sine) {
    const uint32_t i = blockIdx.y * THREADS + threadIdx.x, pair = i % half;
    if (i >= n_heads * half) return;
    const size_t at = size_t(blockIdx.x) * half + pair;
    float *a = x + (size_t(blockIdx.x) * n_heads + i / half) * 2 * half + pair, *b = a + half;
    const float first = *a, second = *b;
    *a = first * cosine[at] - second * sine[at];
    *b = second * cosine[at] + first * sine[at];
}

void cu_rope(skv_device *base, float *x, size_t n_heads) {
    cu_device *d = cu_of(base);
    const size_t half = size_t(d->cache.dim) / 2;
    CU_LAUNCH(d, rope_kernel, dim3(unsigned(d->batch.n_tokens), cu_blocks(n_heads * half, THREADS)), THREADS, 0, x,
              uint32_t(n_heads), uint32_t(half), d->cosine, d->sine);
}

static __global__ void steer_kernel(cu_batch b, int32_t layer, int32_t hidden, float *x) {
    const cu_token t = b.tokens[blockIdx.x];
    const cu_part *part = b.parts + t.part;
    const int32_t i = int32_t(blockIdx.y * blockDim.x + threadIdx.x);
    if (!t.steered || !part->vector || part->steered_layer != layer || i >= hidden) return;
    x[size_t(blockIdx.x) * size_t(hidden) + size_t(i)] += t.alpha * part->vector[i];
}

void cu_steer(skv_device *base, size_t layer, float *x) {
    cu_device *d = cu_of(base);
    const int32_t hidden = d->work.config->hidden;
    bool any = false;
    for (size_t p = 0; p < d->host->n_parts; p++)
        any |= d->host->parts[p].vector && size_t(d->host->parts[p].steered_layer) == layer;
    if (!any) return;
    CU_LAUNCH(d, steer_kernel, dim3(unsigned(d->batch.n_tokens), cu_blocks(size_t(hidden), THREADS)), THREADS, 0,
              d->batch, int32_t(layer), hidden, x);
}

static __global__ void silu_kernel(float *gate, const float *up, size_t n) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

void cu_silu_mul(skv_device *base, float *gate, const float *up, size_t n) {
    CU_LAUNCH(cu_of(base), silu_kernel, cu_blocks(n, THREADS), THREADS, 0, gate, up, n);
}

static __global__ void add_kernel(float *x, const float *y, size_t n) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) x[i] += y[i];
}

void cu_add(skv_device *base, float *x, const float *y, size_t n) {
    CU_LAUNCH(cu_of(base), add_kernel, cu_blocks(n, THREADS), THREADS, 0, x, y, n);
}

/* One block a column, so that y may be x: the rows of a column are moved in order. */
static __global__ void last_kernel(cu_batch b, int32_t hidden, const float *x, float *y) {
    const int32_t i = int32_t(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= hidden) return;
    for (int32_t p = 0; p < b.n_parts; p++) {
        const size_t from = size_t(b.parts[p].first + b.parts[p].n - 1);
        y[size_t(p) * size_t(hidden) + size_t(i)] = x[from * size_t(hidden) + size_t(i)];
    }
}

void cu_last(skv_device *base, const float *x, float *y) {
    cu_device *d = cu_of(base);
    const int32_t hidden = d->work.config->hidden;
    if (x == y && d->batch.n_tokens == d->batch.n_parts) return; /* each is in its place */
    CU_LAUNCH(d, last_kernel, cu_blocks(size_t(hidden), THREADS), THREADS, 0, d->batch, hidden, x, y);
}

/* Of a block, in one order. scratch [WARPS] shared. */
static __device__ double block_sum_double(double x, double *scratch) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < WARPS; w++) sum += scratch[w];
    return sum;
}

static __global__ void sentence_kernel(cu_batch b, size_t hidden, const float *x) {
    __shared__ double scratch[WARPS];
    const cu_part part = b.parts[blockIdx.x];
    for (int32_t t = part.first; t < part.first + part.n; t++) {
        const cu_token token = b.tokens[t];
        if (token.mark != SKV_MARK_ADD && token.mark != SKV_MARK_CLOSE) continue; /* the same for the whole block */
        double squares = 0;
        for (size_t i = threadIdx.x; i < hidden; i += THREADS) {
            part.sum[i] += x[size_t(t) * hidden + i];
            const float mean = part.sum[i] / float(token.length);
            squares += double(mean) * double(mean);
        }
        if (token.mark == SKV_MARK_ADD) continue;
        squares = block_sum_double(squares, scratch);
        const float norm = squares > 0 ? float(sqrt(squares)) : 1.0f;
        for (size_t i = threadIdx.x; i < cu_padded(hidden); i += THREADS) {
            token.vector[i] = i < hidden ? part.sum[i] / float(token.length) / norm : 0;
            if (i < hidden) part.sum[i] = 0;
        }
    }
}

void cu_sum_sentences(skv_device *base, const float *x) {
    cu_device *d = cu_of(base);
    bool any = false;
    for (size_t t = 0; t < d->host->n_tokens; t++)
        any |= d->host->tokens[t].mark == SKV_MARK_ADD || d->host->tokens[t].mark == SKV_MARK_CLOSE;
    if (any)
        CU_LAUNCH(d, sentence_kernel, unsigned(d->batch.n_parts), THREADS, 0, d->batch, size_t(d->work.config->hidden),
                  x);
}

/* out[j − first, i], i < j; a warp a pair. */
static __global__ void similar_kernel(float *const *vectors, size_t width, size_t first, size_t n, float *out) {
    const size_t pair = size_t(blockIdx.x) * WARPS + threadIdx.x / WARP, i = pair % n, j = first + pair / n;
    if (j >= n || i >= j || !vectors[i] || !vectors[j]) return; /* whole warps, and no barrier follows */
    float sum = 0;
    for (size_t k = threadIdx.x % WARP; k < width; k += WARP) sum += vectors[i][k] * vectors[j][k];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) out[pair] = sum;
}

void cu_similarities(skv_device *base, float *const *vectors, size_t width, size_t first, size_t n, float *out) {
    cu_device *d = cu_of(base);
    const size_t pairs = (n - first) * n, bytes = n * sizeof *vectors;
    if (!pairs || base->error.code || !cu_check(d, cudaSetDevice(d->index), "cudaSetDevice")) return;
    if (!cu_grow(d, &d->vectors, bytes) || !cu_grow(d, &d->similar, pairs * sizeof *out)) return;
    base->backend->write(base, d->vectors.data, vectors, bytes);
    CU_LAUNCH(d, similar_kernel, cu_blocks(pairs, WARPS), THREADS, 0, static_cast<float *const *>(d->vectors.data),
              width, first, n, static_cast<float *>(d->similar.data));
    base->backend->read(base, out, d->similar.data, pairs * sizeof *out);
}
