/* The functions of NVIDIA's driver that running engines needs, with their C types from cuda.h and no GPU behind them.
   Device memory is host memory; every call says its name and arguments on stderr. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAY(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr))

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef void *handle;

static int primary;
static handle const STREAM = (handle)0x51, EVENT = (handle)0x77, GRAPH = (handle)0x99, EXECUTABLE = (handle)0xaa;

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuGetErrorName(CUresult code, const char **name) { *name = "CUDA_ERROR"; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return ordinal ? 101 : 0; }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) { snprintf(name, size, "GPU %d", device); return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) { *value = attribute == 75 ? 9 : 0; return 0; }
CUresult cuDeviceGetUuid(unsigned char *uuid, CUdevice device)
{
    for (int i = 0; i < 16; i++) uuid[i] = i * 17;
    return 0;
}

CUresult cuDevicePrimaryCtxRetain(handle *context, CUdevice device)
{
    *context = &primary;
    SAY("cuDevicePrimaryCtxRetain %d", device);
    return 0;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { SAY("cuDevicePrimaryCtxRelease %d", device); return 0; }
CUresult cuCtxPushCurrent_v2(handle context)
{
    SAY("cuCtxPushCurrent %s", context == &primary ? "ours" : "unknown");
    return 0;
}
CUresult cuCtxPopCurrent_v2(handle *context) { *context = &primary; SAY("cuCtxPopCurrent"); return 0; }

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *free_bytes = 100; *total = 200; return 0; }
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size)
{
    if (size > 1000000) return 2;
    *address = (CUdeviceptr)(uintptr_t)malloc(size);
    return 0;
}
CUresult cuMemFree_v2(CUdeviceptr address) { free((void *)(uintptr_t)address); return 0; }
CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags) { *address = malloc(size); return flags; }
CUresult cuMemFreeHost(void *address) { free(address); return 0; }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr device, const void *host, size_t size, handle stream)
{
    SAY("cuMemcpyHtoDAsync %zu bytes, stream %p", size, stream);
    memcpy((void *)(uintptr_t)device, host, size);
    return 0;
}
CUresult cuMemcpyDtoHAsync_v2(void *host, CUdeviceptr device, size_t size, handle stream)
{
    SAY("cuMemcpyDtoHAsync %zu bytes, stream %p", size, stream);
    memcpy(host, (void *)(uintptr_t)device, size);
    return 0;
}
CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address)
{
    if (address == 1) return 1;
    *(unsigned *)value = attribute == 2 ? 2 : 0;
    return 0;
}

CUresult cuStreamCreate(handle *stream, unsigned flags) { *stream = STREAM; SAY("cuStreamCreate flags %u", flags); return 0; }
CUresult cuStreamDestroy_v2(handle stream) { return stream == STREAM ? 0 : 1; }
CUresult cuStreamSynchronize(handle stream) { return stream == STREAM ? 0 : 1; }
CUresult cuEventCreate(handle *event, unsigned flags) { *event = EVENT; SAY("cuEventCreate flags %u", flags); return 0; }
CUresult cuEventDestroy_v2(handle event) { return event == EVENT ? 0 : 1; }
CUresult cuEventRecord(handle event, handle stream) { SAY("cuEventRecord %p in %p", event, stream); return 0; }
CUresult cuEventElapsedTime(float *milliseconds, handle start, handle end) { *milliseconds = 1.5f; return 0; }
CUresult cuStreamWaitEvent(handle stream, handle event, unsigned flags)
{
    SAY("cuStreamWaitEvent stream %p, event %p, flags %u", stream, event, flags);
    return 0;
}

CUresult cuStreamBeginCapture_v2(handle stream, int mode)
{
    SAY("cuStreamBeginCapture stream %p, mode %d", stream, mode);
    return 0;
}
CUresult cuStreamEndCapture(handle stream, handle *graph) { *graph = GRAPH; return stream == STREAM ? 0 : 1; }
CUresult cuGraphInstantiateWithFlags(handle *executable, handle graph, unsigned long long flags)
{
    SAY("cuGraphInstantiateWithFlags graph %p, flags %llu", graph, flags);
    *executable = EXECUTABLE;
    return 0;
}
CUresult cuGraphDestroy(handle graph) { return graph == GRAPH ? 0 : 1; }
CUresult cuGraphLaunch(handle executable, handle stream)
{
    SAY("cuGraphLaunch graph %p, stream %p", executable, stream);
    return 0;
}
CUresult cuGraphExecDestroy(handle executable) { SAY("cuGraphExecDestroy graph %p", executable); return 0; }

CUresult cuModuleLoadData(handle *module, const void *image)
{
    SAY("cuModuleLoadData %d", strstr(image, ".version") != NULL);
    *module = (handle)0xbb;
    return 0;
}
CUresult cuModuleGetFunction(handle *function, handle module, const char *name)
{
    static const char *known[] = {"cut", "resample", "blend", "compare"};
    for (int i = 0; i < 4; i++)
        if (!strcmp(name, known[i])) *function = (handle)(uintptr_t)(0xf0 + i);
    return module == (handle)0xbb ? 0 : 1;
}
CUresult cuModuleUnload(handle module) { SAY("cuModuleUnload %p", module); return 0; }
CUresult cuLaunchKernel(handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, handle stream, void **parameters, void **extra)
{
    SAY("cuLaunchKernel %p, grid %u %u %u, block %u %u %u, shared %u, stream %p, extra %p", function, gx, gy, gz, bx, by,
        bz, shared, stream, (void *)extra);
    SAY("to %llx, from %llx, then %u %u, threads %u", *(unsigned long long *)parameters[0],
        *(unsigned long long *)parameters[1], *(unsigned *)parameters[2], *(unsigned *)parameters[3],
        *(unsigned *)parameters[8]);
    return 0;
}
CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, handle stream)
{
    SAY("cuMemsetD8Async %llx, %u, %zu, stream %p", address, value, count, stream);
    return 0;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, handle stream)
{
    SAY("cuMemcpyDtoDAsync to %llx, from %llx, %zu bytes, stream %p", to, from, size, stream);
    return 0;
}

/* How cuda-python finds the functions: by their plain names, whose newest version it is given. */
CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status)
{
    static const char *const suffixes[] = {"_v2", ""};
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    const char *name = strcmp(symbol, "cuGraphInstantiate") ? symbol : "cuGraphInstantiateWithFlags";
    *function = NULL;
    for (int i = 0; i < 2 && library && !*function; i++) {
        char versioned[128];
        snprintf(versioned, sizeof versioned, "%s%s", name, suffixes[i]);
        *function = dlsym(library, versioned);
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
