/* Weights and products with them. A matrix lies row by row, rows padded with zeros to a multiple of eight elements.
 *
 * kernel           grid, block                        moves                          why
 * pack_kernel      [elements / 256], 256              stored rows to padded rows     once, at load
 * embed_kernel     [tokens], 256                      one row a token
 * gemv_kernel      [all outputs / 8], 128             every weight once              up to four rows: the weights are
 *                                                                                    the traffic; a warp two outputs
 * tile_kernel      [outputs / 64, rows / 32], 128     every weight once for 32 rows  deterministic: one order of
 *                                                                                    summation whatever the batch
 * halves_kernel    [rows, outputs / 256], 256         reads two products, writes y   few rows: both parts of x in one
 * bias_kernel      [rows, outputs / 256], 256         writes y                       cuBLAS adds to it (beta = 1)
 * split_kernel     [rows, inputs / 256], 256          x as a sum of two bf16          f32 activations times bf16
 *                                                                                    weights, as on the CPU: rounding
 *                                                                                    them once moves logits by percents
 * best_kernel      [rows], 1024                       logits once, from L2           only ids leave the device
 * stream_kernel    [8 × processors], 256              reads all it is given          what memory can do at most
 *
 * gemv_kernel is meant to be bound by the memory: 1555 GB/s on an A100 are 10.2 bytes a clock of each of its 108
 * multiprocessors (1.41 GHz), 3350 GB/s on an H100 14.5 of 132 (1.75 GHz). R rows, bf16:
 * - In flight: eight loads of 16 bytes a lane before the first is used, and at most 96 registers, so that 20 warps and
 *   80 KB are on their way on a multiprocessor; bandwidth × 650 ns of latency are 9 and 17 KB. 3584 outputs are
 *   1792 warps, which is 54 KB for each of 132 multiprocessors; a row of 576 is on its way as a whole.
 * - First-level cache, 128 bytes a clock: a warp's 1024 bytes of weights take 8 clocks, its inputs 8 R, as each float4
 *   serves two outputs and the lanes 4 … 7 of eight take their second half first, without which two of them would
 *   meet in every bank. 64 bytes of weights a clock at one row, 26 at four.
 * - Instructions for 16 bytes of weights: 1 load, 8 to widen, 4 to turn, 8 R multiply-adds, R loads of inputs: 22 at
 *   one row, 49 at four. A multiprocessor issues 200 (A100) and 140 (H100) of them a warp in the time that the memory
 *   takes for 512 bytes; the A100's 64 FP32 lanes are busy for 16 of those 50 clocks.
 */
#include <cfloat>

#include "cuda.cuh"

static size_t row_of(const skv_matrix *w) { return (size_t(w->n_in) + 7) / 8 * 8; }

template <typename From, typename To>
static __global__ void pack_kernel(const From *source, size_t n, size_t n_in, size_t row, To *to) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const size_t column = i % row;
    narrow(column < n_in ? widen(source[i / row * n_in + column]) : 0.0f, to + i);
}

template <typename From>
static void pack_rows(cu_device *d, const skv_matrix *w, const void *source, size_t first, size_t n) {
    const size_t row = row_of(w), elements = n * row, at = first * row;
    const auto *from = static_cast<const From *>(source);
    if (w->type == SKV_F32)
        CU_LAUNCH(d, (pack_kernel<From, float>), cu_blocks(elements, THREADS), THREADS, 0, from, elements,
                  size_t(w->n_in), row, static_cast<float *>(w->data) + at);
    else
        CU_LAUNCH(d, (pack_kernel<From, __nv_bfloat16>), cu_blocks(elements, THREADS), THREADS, 0, from, elements,
                  size_t(w->n_in), row, static_cast<__nv_bfloat16 *>(w->data) + at);
}

void cu_pack(skv_device *base, skv_matrix *w, const void *source, skv_dtype type) {
    cu_device *d = cu_of(base);
    const size_t size = skv_dtypes[type].size, stored = size_t(w->n_in) * size, n_out = size_t(w->n_out);
    size_t most = (size_t(32) << 20) / stored;
    most = most < 1 ? 1 : most > n_out ? n_out : most;
    char *packing = static_cast<char *>(base->backend->alloc(base, most, stored));
    if (packing) w->data = base->backend->alloc(base, skv_mul(n_out, row_of(w)), skv_dtypes[w->type].size);
    for (size_t first = 0; w->data && first < n_out; first += most) {
        const size_t n = n_out - first < most ? n_out - first : most;
        const char *from = static_cast<const char *>(source) + first * stored;
        if (!cu_check(d, cudaMemcpyAsync(packing, from, n * stored, cudaMemcpyHostToDevice, d->stream), "weights"))
            break;
        if (type == SKV_F32) pack_rows<float>(d, w, packing, first, n);
        if (type == SKV_BF16) pack_rows<__nv_bfloat16>(d, w, packing, first, n);
        if (type == SKV_F16) pack_rows<__half>(d, w, packing, first, n);
        cu_check(d, cudaStreamSynchronize(d->stream), "weights"); /* the source is the caller's again */
    }
    base->backend->free(base, packing);
}

template <typename T>
static __global__ void embed_kernel(cu_batch b, const T *table, size_t row, size_t n_in, float *x) {
    const T *from = table + size_t(b.tokens[blockIdx.x].id) * row;
    for (size_t i = threadIdx.x; i < n_in; i += THREADS) x[blockIdx.x * n_in + i] = widen(from[i]);
}

void cu_embed(skv_device *base, const skv_matrix *table, float *x) {
    cu_device *d = cu_of(base);
    if (table->type == SKV_F32)
        CU_LAUNCH(d, (embed_kernel<float>), unsigned(d->batch.n_tokens), THREADS, 0, d->batch,
                  static_cast<const float *>(table->data), row_of(table), size_t(table->n_in), x);
    else
        CU_LAUNCH(d, (embed_kernel<__nv_bfloat16>), unsigned(d->batch.n_tokens), THREADS, 0, d->batch,
                  static_cast<const __nv_bfloat16 *>(table->data), row_of(table), size_t(table->n_in), x);
}

/* ---- few rows ---- */

/* A matrix of one input; its outputs stand behind `before` others. */
struct gemv_job {
    const void *w;
    const float *bias;
    float *y;
    int32_t n_out, before;
};

struct gemv_jobs {
    gemv_job of[3];
    int32_t n_jobs, n_out; /* n_out: of all */
};

struct gemv_output {
    gemv_job job;
    size_t row; /* of its matrix */
};

/* Written out, as an index that is no constant would put the parameters into local memory. */
static __device__ __forceinline__ gemv_output output_at(const gemv_jobs &jobs, int32_t out) {
    gemv_job job = jobs.of[0];
    if (jobs.n_jobs > 1 && out >= jobs.of[1].before) job = jobs.of[1];
    if (jobs.n_jobs > 2 && out >= jobs.of[2].before) job = jobs.of[2];
    return {job, size_t(out - job.before)};
}

/* Outputs of a warp, and vectors of each that a lane has on their way at once. */
constexpr int GEMV_OUT = 2, GEMV_LOADS = 4, GEMV_THREADS = 128, GEMV_BLOCK = GEMV_THREADS / WARP * GEMV_OUT;

/* Eight weights of 16 bytes in order; where `turn` is 4, the last four first. */
static __device__ __forceinline__ void widen_vector(uint4 raw, int32_t turn, float (&to)[8]) {
    const uint32_t words[4] = {turn ? raw.z : raw.x, turn ? raw.w : raw.y, turn ? raw.x : raw.z, turn ? raw.y : raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

static __device__ __forceinline__ void widen_vector(uint4 raw, int32_t, float (&to)[4]) {
    to[0] = __uint_as_float(raw.x), to[1] = __uint_as_float(raw.y);
    to[2] = __uint_as_float(raw.z), to[3] = __uint_as_float(raw.w);
}

/* The inputs of a vector of weights, zero from `left` on; whole: there are that many, and x is a multiple of 16. */
template <int EACH>
static __device__ __forceinline__ void load_inputs(const float *x, int32_t left, int32_t turn, bool whole,
                                                   float (&to)[EACH]) {
#pragma unroll
    for (int k = 0; k < EACH; k += 4) {
        const int32_t at = k ^ turn;
        if (whole) {
            const float4 four = __ldg(reinterpret_cast<const float4 *>(x + at));
            to[k] = four.x, to[k + 1] = four.y, to[k + 2] = four.z, to[k + 3] = four.w;
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) to[k + i] = at + i < left ? __ldg(x + at + i) : 0;
    }
}

/* y[r, o] of R rows for GEMV_OUT outputs a warp: lane l multiplies vectors l, l + 32, …, in order whatever R is. */
template <typename T, int R>
static __global__ void __launch_bounds__(GEMV_THREADS, 5)
    gemv_kernel(gemv_jobs jobs, const float *x, int32_t n_in, int32_t row, bool whole) {
    constexpr int EACH = 16 / int(sizeof(T)), STEP = EACH * WARP;
    const int32_t lane = int32_t(threadIdx.x % WARP), turn = EACH == 8 ? lane & 4 : 0;
    const int32_t first = int32_t(blockIdx.x) * GEMV_BLOCK + int32_t(threadIdx.x / WARP) * GEMV_OUT;
    if (first >= jobs.n_out) return; /* whole warps, and no barrier follows */
    const T *w[GEMV_OUT];
#pragma unroll
    for (int j = 0; j < GEMV_OUT; j++) { /* behind the last output that one again */
        const gemv_output out = output_at(jobs, min(first + j, jobs.n_out - 1));
        w[j] = static_cast<const T *>(out.job.w) + out.row * size_t(row);
    }
    float sums[GEMV_OUT][R] = {};
    for (int32_t i0 = EACH * lane; i0 < n_in; i0 += STEP * GEMV_LOADS) {
        uint4 raw[GEMV_LOADS][GEMV_OUT];
#pragma unroll
        for (int u = 0; u < GEMV_LOADS; u++)
#pragma unroll
            for (int j = 0; j < GEMV_OUT; j++)
                if (i0 + u * STEP < n_in) raw[u][j] = __ldcs(reinterpret_cast<const uint4 *>(w[j] + i0 + u * STEP));
#pragma unroll
        for (int u = 0; u < GEMV_LOADS; u++) {
            const int32_t i = i0 + u * STEP;
            if (i >= n_in) break;
            float weights[GEMV_OUT][EACH];
#pragma unroll
            for (int j = 0; j < GEMV_OUT; j++) widen_vector(raw[u][j], turn, weights[j]);
#pragma unroll
            for (int r = 0; r < R; r++) {
                float in[EACH];
                load_inputs<EACH>(x + size_t(r) * size_t(n_in) + size_t(i), n_in - i, turn, whole, in);
#pragma unroll
                for (int j = 0; j < GEMV_OUT; j++)
#pragma unroll
                    for (int k = 0; k < EACH; k++) sums[j][r] = fmaf(weights[j][k], in[k], sums[j][r]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < GEMV_OUT; j++) {
        const gemv_output out = output_at(jobs, min(first + j, jobs.n_out - 1));
        const float bias = out.job.bias ? out.job.bias[out.row] : 0.0f;
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float sum = warp_sum(sums[j][r]);
            if (lane == 0) out.job.y[size_t(r) * size_t(out.job.n_out) + out.row] = sum + bias;
        }
    }
}

template <typename T>
static void gemv(cu_device *d, const gemv_jobs &jobs, const float *x, size_t n, int n_in, int row) {
    const unsigned grid = cu_blocks(size_t(jobs.n_out), GEMV_BLOCK);
    const auto kernel = n == 1   ? gemv_kernel<T, 1>
                        : n == 2 ? gemv_kernel<T, 2>
                        : n == 3 ? gemv_kernel<T, 3>
                                 : gemv_kernel<T, 4>;
    CU_LAUNCH(d, kernel, grid, GEMV_THREADS, 0, jobs, x, n_in, row, n_in % 8 == 0);
}

/* ---- one order whatever the batch ---- */

/* A block's tile of outputs and of rows, and how much of the inputs is in shared memory at a time. */
constexpr int TILE_OUT = 64, TILE_ROWS = 32, TILE_IN = 32, TILE_THREADS = 128;
constexpr int TILE_STRIDE = TILE_IN + 8; /* bf16 of a row in shared memory: no two lanes of ldmatrix share a bank */

/* y [n, n_out] = x Wᵀ + bias in tensor cores: x is the sum of two bf16, whose products are added high before low,
 * sixteen inputs at a time, in order. A warp has 16 outputs. */
static __global__ void __launch_bounds__(TILE_THREADS, 1)
    tile_kernel(const __nv_bfloat16 *w, const float *bias, const float *x, int32_t n_out, int32_t n_in, int32_t row,
                int32_t n, float *y) {
    __shared__ __align__(16) __nv_bfloat16 weights[TILE_OUT * TILE_STRIDE];
    __shared__ __align__(16) __nv_bfloat16 parts[2][TILE_ROWS * TILE_STRIDE]; /* high, low */
    const int32_t tid = int32_t(threadIdx.x), lane = tid % WARP, warp = tid / WARP;
    const int32_t out0 = int32_t(blockIdx.x) * TILE_OUT, row0 = int32_t(blockIdx.y) * TILE_ROWS;
    float acc[TILE_ROWS / 8][4] = {};
    for (int32_t k0 = 0; k0 < n_in; k0 += TILE_IN) {
        for (int32_t i = tid; i < TILE_OUT * TILE_IN / 8; i += TILE_THREADS) {
            const int32_t o = i / (TILE_IN / 8), k = i % (TILE_IN / 8) * 8;
            uint4 eight = make_uint4(0, 0, 0, 0);
            if (out0 + o < n_out && k0 + k < row)
                eight = __ldg(reinterpret_cast<const uint4 *>(w + size_t(out0 + o) * size_t(row) + size_t(k0 + k)));
            *reinterpret_cast<uint4 *>(weights + o * TILE_STRIDE + k) = eight;
        }
        for (int32_t i = tid; i < TILE_ROWS * TILE_IN; i += TILE_THREADS) {
            const int32_t r = i / TILE_IN, k = i % TILE_IN;
            const bool there = row0 + r < n && k0 + k < n_in;
            const float value = there ? x[size_t(row0 + r) * size_t(n_in) + size_t(k0 + k)] : 0.0f;
            const __nv_bfloat16 high = __float2bfloat16_rn(value);
            parts[0][r * TILE_STRIDE + k] = high;
            parts[1][r * TILE_STRIDE + k] = __float2bfloat16_rn(value - __bfloat162float(high));
        }
        __syncthreads();
#pragma unroll
        for (int32_t k = 0; k < TILE_IN; k += 16) {
            uint32_t a[4];
            cudax_ldmatrix_x4(a, weights + (warp * 16 + lane % 16) * TILE_STRIDE + k + lane / 16 * 8);
#pragma unroll
            for (int32_t tile = 0; tile < TILE_ROWS / 8; tile++)
#pragma unroll
                for (int32_t part = 0; part < 2; part++) {
                    const __nv_bfloat16 *from = parts[part] + (tile * 8 + lane / 4) * TILE_STRIDE + k + lane % 4 * 2;
                    const uint32_t b[2] = {*reinterpret_cast<const uint32_t *>(from),
                                           *reinterpret_cast<const uint32_t *>(from + 8)};
                    cudax_mma_16816(acc[tile], a, b, acc[tile]);
                }
        }
        __syncthreads();
    }
#pragma unroll
    for (int32_t tile = 0; tile < TILE_ROWS / 8; tile++)
#pragma unroll
        for (int32_t i = 0; i < 4; i++) {
            const int32_t o = out0 + warp * 16 + lane / 4 + i / 2 * 8, r = row0 + tile * 8 + lane % 4 * 2 + i % 2;
            if (o < n_out && r < n) y[size_t(r) * size_t(n_out) + size_t(o)] = acc[tile][i] + (bias ? bias[o] : 0.0f);
        }
}

/* The same of float32 weights: a thread has 8 outputs of 2 rows, and adds them up input by input. */
static __global__ void __launch_bounds__(TILE_THREADS, 1)
    tile_f32_kernel(const float *w, const float *bias, const float *x, int32_t n_out, int32_t n_in, int32_t row,
                    int32_t n, float *y) {
    __shared__ float weights[TILE_IN][TILE_OUT + 1], inputs[TILE_IN][TILE_ROWS + 1];
    const int32_t tid = int32_t(threadIdx.x), first_out = tid % 8, first_row = tid / 8;
    const int32_t out0 = int32_t(blockIdx.x) * TILE_OUT, row0 = int32_t(blockIdx.y) * TILE_ROWS;
    float acc[2][8] = {};
    for (int32_t k0 = 0; k0 < n_in; k0 += TILE_IN) {
        for (int32_t i = tid; i < TILE_OUT * TILE_IN; i += TILE_THREADS) {
            const int32_t o = i / TILE_IN, k = i % TILE_IN;
            const bool there = out0 + o < n_out && k0 + k < n_in;
            weights[k][o] = there ? w[size_t(out0 + o) * size_t(row) + size_t(k0 + k)] : 0.0f;
        }
        for (int32_t i = tid; i < TILE_ROWS * TILE_IN; i += TILE_THREADS) {
            const int32_t r = i / TILE_IN, k = i % TILE_IN;
            const bool there = row0 + r < n && k0 + k < n_in;
            inputs[k][r] = there ? x[size_t(row0 + r) * size_t(n_in) + size_t(k0 + k)] : 0.0f;
        }
        __syncthreads();
        for (int32_t k = 0; k < TILE_IN; k++)
#pragma unroll
            for (int32_t r = 0; r < 2; r++)
#pragma unroll
                for (int32_t o = 0; o < 8; o++)
                    acc[r][o] = fmaf(weights[k][first_out + 8 * o], inputs[k][first_row + 16 * r], acc[r][o]);
        __syncthreads();
    }
    for (int32_t r = 0; r < 2; r++)
        for (int32_t i = 0; i < 8; i++) {
            const int32_t o = out0 + first_out + 8 * i, at = row0 + first_row + 16 * r;
            if (o < n_out && at < n) y[size_t(at) * size_t(n_out) + size_t(o)] = acc[r][i] + (bias ? bias[o] : 0.0f);
        }
}

static void multiply_tiles(cu_device *d, const skv_linear *job, const float *x, size_t n) {
    const skv_matrix *w = job->w;
    const int32_t row = int32_t(row_of(w));
    const dim3 grid(cu_blocks(size_t(w->n_out), TILE_OUT), cu_blocks(n, TILE_ROWS));
    if (w->type == SKV_F32)
        CU_LAUNCH(d, tile_f32_kernel, grid, TILE_THREADS, 0, static_cast<const float *>(w->data), job->bias, x,
                  w->n_out, w->n_in, row, int32_t(n), job->y);
    else
        CU_LAUNCH(d, tile_kernel, grid, TILE_THREADS, 0, static_cast<const __nv_bfloat16 *>(w->data), job->bias, x,
                  w->n_out, w->n_in, row, int32_t(n), job->y);
}

/* ---- many rows ---- */

/* A block for 256 elements of a row, so that nobody divides by its length. */
static dim3 row_blocks(size_t n, size_t width) { return dim3(unsigned(n), cu_blocks(width, THREADS)); }

static __global__ void bias_kernel(const float *bias, size_t n_out, float *y) {
    const size_t o = size_t(blockIdx.y) * THREADS + threadIdx.x;
    if (o < n_out) y[blockIdx.x * n_out + o] = bias[o];
}

/* x = high + low, each [n, row]. */
static __global__ void split_kernel(const float *x, size_t n_in, size_t row, __nv_bfloat16 *high) {
    const size_t i = size_t(blockIdx.y) * THREADS + threadIdx.x, at = blockIdx.x * row + i;
    if (i >= row) return;
    const float value = i < n_in ? x[blockIdx.x * n_in + i] : 0.0f;
    const __nv_bfloat16 part = __float2bfloat16_rn(value);
    high[at] = part;
    high[gridDim.x * row + at] = __float2bfloat16_rn(value - __bfloat162float(part));
}

static void fill_bias(cu_device *d, const skv_linear *job, size_t n) {
    const size_t n_out = size_t(job->w->n_out);
    CU_LAUNCH(d, bias_kernel, row_blocks(n, n_out), THREADS, 0, job->bias, n_out, job->y);
}

/* y [n, n_out] ← beta y + x Wᵀ */
static void gemm(cu_device *d, const skv_matrix *w, const void *x, size_t row_x, cudaDataType type, size_t n,
                 float beta, float *y) {
    const int row_w = int(row_of(w)), n_rows = int(n);
    const skv_matrix m = *w;
    const auto multiply = [=] {
        const float one = 1;
        return cu_check_blas(d,
                             cublasGemmEx(d->blas, CUBLAS_OP_T, CUBLAS_OP_N, m.n_out, n_rows, m.n_in, &one, m.data,
                                          type, row_w, x, type, int(row_x), &beta, y, CUDA_R_32F, m.n_out,
                                          CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                             "cublasGemmEx");
    };
    if (!d->recording) {
        multiply();
        return;
    }
    const void *const what[] = {m.data, x, y};
    const size_t sizes[] = {n, row_x, size_t(beta != 0)};
    d->steps.push_back({cu_hash(cu_hash(0, what, sizeof what), sizes, sizeof sizes), multiply});
}

/* y ← both halves of sums [2, n, n_out] and the bias. */
static __global__ void halves_kernel(const float *sums, const float *bias, size_t n_out, float *y) {
    const size_t o = size_t(blockIdx.y) * THREADS + threadIdx.x, at = blockIdx.x * n_out + o;
    if (o < n_out) y[at] = sums[at] + sums[gridDim.x * n_out + at] + (bias ? bias[o] : 0.0f);
}

/* Products with bf16 weights: both parts of x are columns of one product while they are few, so that the weights are
 * read once, and of two products where the arithmetic is what takes time. */
static void multiply_split(cu_device *d, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n) {
    const size_t row = row_of(jobs[0].w), n_in = size_t(jobs[0].w->n_in);
    auto *high = static_cast<__nv_bfloat16 *>(d->narrow);
    CU_LAUNCH(d, split_kernel, row_blocks(n, row), THREADS, 0, x, n_in, row, high);
    for (const skv_linear *job = jobs; job < jobs + n_jobs; job++) {
        const size_t n_out = size_t(job->w->n_out);
        if (2 * n * n_out <= d->n_halves) {
            gemm(d, job->w, high, row, CUDA_R_16BF, 2 * n, 0, d->halves);
            CU_LAUNCH(d, halves_kernel, row_blocks(n, n_out), THREADS, 0, d->halves, job->bias, n_out, job->y);
            continue;
        }
        if (job->bias) fill_bias(d, job, n);
        gemm(d, job->w, high, row, CUDA_R_16BF, n, job->bias ? 1 : 0, job->y);
        gemm(d, job->w, high + n * row, row, CUDA_R_16BF, n, 1, job->y);
    }
}

void cu_linear(skv_device *base, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n) {
    cu_device *d = cu_of(base);
    const skv_matrix *first = jobs[0].w;
    const size_t row = row_of(first), n_in = size_t(first->n_in);
    if (base->error.code) return;
    for (size_t i = 0; d->deterministic && i < n_jobs; i++) multiply_tiles(d, jobs + i, x, n);
    if (d->deterministic) return;
    if (n <= GEMV_ROWS) {
        gemv_jobs few = {};
        for (size_t i = 0; i < n_jobs; i++) {
            few.of[i] = {jobs[i].w->data, jobs[i].bias, jobs[i].y, jobs[i].w->n_out, few.n_out};
            few.n_out += jobs[i].w->n_out;
        }
        few.n_jobs = int32_t(n_jobs);
        if (first->type == SKV_F32)
            gemv<float>(d, few, x, n, first->n_in, int(row));
        else
            gemv<__nv_bfloat16>(d, few, x, n, first->n_in, int(row));
        return;
    }
    if (first->type == SKV_BF16) {
        multiply_split(d, jobs, n_jobs, x, n);
        return;
    }
    for (size_t i = 0; i < n_jobs; i++) {
        if (jobs[i].bias) fill_bias(d, jobs + i, n);
        gemm(d, jobs[i].w, x, n_in, CUDA_R_32F, n, jobs[i].bias ? 1 : 0, jobs[i].y);
    }
}

/* ---- logits ---- */

constexpr int BEST_THREADS = 1024;

struct logit {
    float value;
    int32_t id;
};

/* Of a warp, ties to the lower id. */
static __device__ __forceinline__ logit warp_best(logit mine) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const logit other = {__shfl_xor_sync(0xffffffffu, mine.value, offset),
                             __shfl_xor_sync(0xffffffffu, mine.id, offset)};
        if (other.value > mine.value || (other.value == mine.value && other.id < mine.id)) mine = other;
    }
    return mine;
}

/* As skv_argmax: every thread begins with the first logit, which stays where it is NaN, and no other NaN is taken. */
static __global__ void __launch_bounds__(BEST_THREADS, 1) best_kernel(const float *logits, size_t n, int32_t *best) {
    static_assert(BEST_THREADS == WARP * WARP, "one warp compares what each found");
    __shared__ logit of[WARP];
    const float *row = logits + blockIdx.x * n;
    logit mine = {row[0], 0};
#pragma unroll 8
    for (size_t i = threadIdx.x; i < n; i += BEST_THREADS)
        if (row[i] > mine.value) mine = {row[i], int32_t(i)};
    mine = warp_best(mine);
    if (threadIdx.x % WARP == 0) of[threadIdx.x / WARP] = mine;
    __syncthreads();
    if (threadIdx.x >= WARP) return; /* whole warps, and no barrier follows */
    mine = warp_best(of[threadIdx.x]);
    if (threadIdx.x == 0) best[blockIdx.x] = fabsf(mine.value) <= FLT_MAX ? mine.id : -1;
}

void cu_project(skv_device *base, const skv_matrix *w, const float *x, size_t n, float *y, int32_t *best) {
    cu_device *d = cu_of(base);
    const size_t n_in = size_t(w->n_in), n_out = size_t(w->n_out), most = cu_logit_rows(&d->work);
    for (size_t first = 0; first < n; first += most) {
        const size_t rows = n - first < most ? n - first : most;
        const skv_linear job = {w, nullptr, d->logits};
        cu_linear(base, &job, 1, x + first * n_in, rows);
        if (best)
            CU_LAUNCH(d, best_kernel, unsigned(rows), BEST_THREADS, 0, d->logits, n_out, d->best + first);
        else
            base->backend->read(base, y + first * n_out, d->logits, rows * n_out * sizeof *y);
    }
    if (best) base->backend->read(base, best, d->best, n * sizeof *best);
}

/* ---- rates ---- */

/* Reads a buffer once, and writes one number a block. */
static __global__ void stream_kernel(const float4 *x, size_t n, float *out) {
    float sum = 0;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        const float4 v = x[i];
        sum += v.x + v.y + v.z + v.w;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) atomicAdd(out, sum);
}

/* All types of weights are multiplied as bf16. */
skv_limits cu_limits(skv_device *base, float *memory, size_t n, skv_dtype) {
    cu_device *d = cu_of(base);
    cudaEvent_t begin = nullptr, end = nullptr;
    const float one = 1, zero = 0;
    int side = 4096;
    skv_limits found = {};
    while (side > 16 && 3 * size_t(side) * size_t(side) > n) side /= 2;
    cu_check(d, cudaSetDevice(d->index), "cudaSetDevice");
    cu_check(d, cudaMemsetAsync(memory, 0, n * sizeof *memory, d->stream), "cudaMemsetAsync");
    if (!cu_check(d, cudaEventCreate(&begin), "an event") || !cu_check(d, cudaEventCreate(&end), "an event"))
        return found;
    const auto rate = [&](double work) {
        float milliseconds = 0;
        cu_check(d, cudaEventRecord(end, d->stream), "an event");
        cu_check(d, cudaEventSynchronize(end), "an event");
        cu_check(d, cudaEventElapsedTime(&milliseconds, begin, end), "an event");
        return milliseconds > 0 ? work / milliseconds * 1e3 : 0.0;
    };
    float *a = memory, *b = memory + size_t(side) * size_t(side), *c = b + size_t(side) * size_t(side);
    for (int pass = 0; pass < 4; pass++) {
        cu_check(d, cudaEventRecord(begin, d->stream), "an event");
        CU_LAUNCH(d, stream_kernel, unsigned(8 * d->n_processors), THREADS, 0, reinterpret_cast<const float4 *>(memory),
                  (n - 1) / 4, memory + n - 1);
        const double read = rate(double(n * sizeof *memory));
        cu_check(d, cudaEventRecord(begin, d->stream), "an event");
        cu_check_blas(d,
                      cublasGemmEx(d->blas, CUBLAS_OP_T, CUBLAS_OP_N, side, side, side, &one, a, CUDA_R_16BF, side, b,
                                   CUDA_R_16BF, side, &zero, c, CUDA_R_32F, side, CUBLAS_COMPUTE_32F,
                                   CUBLAS_GEMM_DEFAULT),
                      "cublasGemmEx");
        const double multiplied = rate(double(side) * side * side);
        found.bytes = read > found.bytes ? read : found.bytes;
        found.macs = multiplied > found.macs ? multiplied : found.macs;
    }
    found.weight_macs = found.macs;
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return found;
}
