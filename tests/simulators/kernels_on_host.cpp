// Runs the kernels of spmdeploy/gpu/kernels.cu on the CPU, one thread after the other.

#include <cmath>
#include <cstddef>
#include <cstring>
#include <utility>

#define __device__
#define __global__
static thread_local struct { unsigned x, y, z; } blockIdx, blockDim, threadIdx;

#include "kernels.cu"

template <typename... Parameters, size_t... I>
static void run_grid(void (*kernel)(Parameters...), unsigned blocks_x, unsigned blocks_y, unsigned threads, void **parameters,
                     std::index_sequence<I...>)
{
    blockDim.x = threads;
    for (blockIdx.y = 0; blockIdx.y < blocks_y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < blocks_x; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
                kernel(*static_cast<Parameters *>(parameters[I])...);
}

template <typename... Parameters>
static bool matches(const char *name, const char *wanted, void (*kernel)(Parameters...), unsigned blocks_x, unsigned blocks_y,
                    unsigned threads, void **parameters)
{
    if (strcmp(name, wanted)) return false;
    run_grid(kernel, blocks_x, blocks_y, threads, parameters, std::index_sequence_for<Parameters...>());
    return true;
}

// parameters: addresses of the parameters, as for cuLaunchKernel. Returns 1 for an unknown kernel.
extern "C" int launch(const char *name, unsigned blocks_x, unsigned blocks_y, unsigned threads, void **parameters)
{
    return !(matches(name, "cut", cut, blocks_x, blocks_y, threads, parameters) ||
             matches(name, "resample", resample, blocks_x, blocks_y, threads, parameters) ||
             matches(name, "blend", blend, blocks_x, blocks_y, threads, parameters) ||
             matches(name, "compare", compare, blocks_x, blocks_y, threads, parameters));
}
