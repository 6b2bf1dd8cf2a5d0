/* cuBLAS on the host: C = alpha op(A) op(B) + beta C, column-major, f32 sums, in the queue of the handle's stream.
 *
 * Types as cuBLAS has them for A and B of one type: bf16 gives f32 or bf16, f32 gives f32. Scalars on the host, read
 * when the function is called. Checked: leading dimensions, and that every matrix is device memory of that size. As
 * cuBLAS would allocate its own workspace in a graph, a captured product without the caller's is refused.
 */
#include <cublas_v2.h>
#include <string.h>

#include <vector>

#include "runtime.h"

using namespace simt;

struct cublasContext {
    cudaStream_t stream;
    bool workspace; // the caller's
};

namespace {

struct Matrix {
    const void *data;
    cudaDataType type;
    size_t row, column; // strides, in elements

    float at(size_t i, size_t j) const {
        const size_t place = i * row + j * column;
        if (type == CUDA_R_32F) return static_cast<const float *>(data)[place];
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(data)[place]) << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
};

/* Eight sums side by side, which compilers make one vector of. */
float dot(const float *a, const float *b, size_t n) {
    float sums[8] = {0}, total = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (size_t j = 0; j < 8; j++) sums[j] += a[i + j] * b[i + j];
    for (; i < n; i++) total += a[i] * b[i];
    for (float sum : sums) total += sum;
    return total;
}

void multiply(size_t m, size_t n, size_t k, float alpha, const Matrix &a, const Matrix &b, float beta, void *c,
              cudaDataType type, size_t ldc) {
    std::vector<float> columns(n * k), row(k);
    for (size_t j = 0; j < n; j++)
        for (size_t l = 0; l < k; l++) columns[j * k + l] = b.at(l, j);
    for (size_t i = 0; i < m; i++) {
        for (size_t l = 0; l < k; l++) row[l] = a.at(i, l);
        for (size_t j = 0; j < n; j++) {
            const float old = beta != 0 ? beta * Matrix{c, type, 1, ldc}.at(i, j) : 0; // C may hold NaN where beta is 0
            const float value = alpha * dot(row.data(), &columns[j * k], k) + old;
            if (type == CUDA_R_32F)
                static_cast<float *>(c)[i + j * ldc] = value;
            else
                static_cast<__nv_bfloat16 *>(c)[i + j * ldc] = __float2bfloat16(value);
        }
    }
}

/* Whether a column-major matrix of that shape is device memory. */
bool valid(const void *data, cudaDataType type, int rows, int columns, int ld) {
    const size_t element = type == CUDA_R_32F ? 4 : 2;
    if (ld < rows || ld < 1) return false;
    if (!rows || !columns) return true;
    const size_t elements = (static_cast<size_t>(columns) - 1) * static_cast<size_t>(ld) + static_cast<size_t>(rows);
    return in_device_memory(data, elements * element) == INSIDE;
}

} // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    int device;
    if (cudaGetDevice(&device) != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = new cublasContext{};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    *handle = {stream, false};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t bytes) {
    if (bytes && in_device_memory(workspace, bytes) != INSIDE) return CUBLAS_STATUS_INVALID_VALUE;
    handle->workspace = bytes > 0;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType type_a, int lda, const void *b,
                            cudaDataType type_b, int ldb, const void *beta, void *c, cudaDataType type_c, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (capturing(handle->stream) && !handle->workspace) return CUBLAS_STATUS_ALLOC_FAILED;
    const bool types = type_a == type_b && (type_a == CUDA_R_16BF ? type_c == CUDA_R_32F || type_c == CUDA_R_16BF
                                                                  : type_a == CUDA_R_32F && type_c == CUDA_R_32F);
    const bool f32 = compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_PEDANTIC ||
                     (compute == CUBLAS_COMPUTE_32F_FAST_TF32 && type_a == CUDA_R_32F);
    if (!types || !f32 || op_a > CUBLAS_OP_T || op_b > CUBLAS_OP_T) return CUBLAS_STATUS_NOT_SUPPORTED;
    const bool plain_a = op_a == CUBLAS_OP_N, plain_b = op_b == CUBLAS_OP_N;
    if (m < 0 || n < 0 || k < 0 || !alpha || !beta || !valid(a, type_a, plain_a ? m : k, plain_a ? k : m, lda) ||
        !valid(b, type_b, plain_b ? k : n, plain_b ? n : k, ldb) || !valid(c, type_c, m, n, ldc))
        return CUBLAS_STATUS_INVALID_VALUE;
    const auto rows = static_cast<size_t>(m), columns = static_cast<size_t>(n), inner = static_cast<size_t>(k);
    const auto stride_a = static_cast<size_t>(lda), stride_b = static_cast<size_t>(ldb),
               stride_c = static_cast<size_t>(ldc);
    const Matrix left = {a, type_a, plain_a ? 1 : stride_a, plain_a ? stride_a : 1};
    const Matrix right = {b, type_b, plain_b ? 1 : stride_b, plain_b ? stride_b : 1};
    const float scale = *static_cast<const float *>(alpha), old = *static_cast<const float *>(beta);
    const auto gemm = [=] { multiply(rows, columns, inner, scale, left, right, old, c, type_c, stride_c); };
    const cudaError_t error = call([&] { return enqueue(handle->stream, {"gemm", nullptr, gemm}); });
    return error ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n,
                              int k, const float *alpha, const float *a, int lda, const float *b, int ldb,
                              const float *beta, float *c, int ldc) {
    return cublasGemmEx(handle, op_a, op_b, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c, CUDA_R_32F,
                        ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

const char *cublasGetStatusString(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS:
        return "the operation completed successfully";
    case CUBLAS_STATUS_NOT_INITIALIZED:
        return "the library was not initialized";
    case CUBLAS_STATUS_INVALID_VALUE:
        return "an unsupported value or parameter was passed to the function";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "the functionality requested is not supported";
    default:
        return "the operation failed";
    }
}

} // extern "C"
