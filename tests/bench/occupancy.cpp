/* Lines of "architecture registers threads static dynamic" (bytes) → blocks that a multiprocessor holds at once. */
#include <climits>
#include <cstdio>

#include <cuda_occupancy.h>

int main() {
    int architecture, registers, threads;
    size_t fixed, dynamic;
    while (scanf("%d %d %d %zu %zu", &architecture, &registers, &threads, &fixed, &dynamic) == 5) {
        cudaOccDeviceProp device;
        device.computeMajor = architecture / 10, device.computeMinor = architecture % 10;
        device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 2048;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32, device.numSms = 1;
        device.sharedMemPerBlock = 48 << 10, device.reservedSharedMemPerBlock = 1 << 10;
        device.sharedMemPerMultiprocessor = size_t(architecture == 90 ? 228 : 164) << 10;
        device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - (1 << 10);
        cudaOccFuncAttributes kernel = {};
        kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = registers, kernel.sharedSizeBytes = fixed;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = dynamic;
        kernel.numBlockBarriers = 1;
        const cudaOccDeviceState state;
        cudaOccResult result;
        const bool fits = fixed + dynamic <= device.sharedMemPerBlockOptin;
        const cudaOccError error =
            fits ? cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic)
                 : CUDA_OCC_SUCCESS;
        if (error != CUDA_OCC_SUCCESS) return 1;
        printf("%d\n", fits ? result.activeBlocksPerMultiprocessor : 0);
    }
}
