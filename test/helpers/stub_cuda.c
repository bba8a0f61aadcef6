/* libcuda.so.1 of a machine whose driver works and has no GPU, or (GLORE_STUB_GPU=86) one of that
   compute capability: enough for MXNet to load and for mxnet_gpu.py to read. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#define NO_DEVICE 100
static int capability(void) { return getenv("GLORE_STUB_GPU") ? atoi(getenv("GLORE_STUB_GPU")) : 0; }
static int no_device(void) { return NO_DEVICE; }
int cuInit(unsigned flags) { return capability() ? 0 : NO_DEVICE; }
int cuDriverGetVersion(int *version) {
    const char *set = getenv("GLORE_STUB_DRIVER");
    return *version = set ? atoi(set) : 11080, 0;
}
int cuDeviceGetCount(int *count) { return *count = capability() != 0, 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetName(char *name, int size, int device) { return strncpy(name, "Stub", size), 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { return *size = 1 << 30, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return *value = attribute == 75 ? capability() / 10 : capability() % 10, 0;
}
int cuGetProcAddress(const char *name, void **function, int version, unsigned long flags) {
    void *own = dlsym(RTLD_DEFAULT, name);
    return *function = own ? own : (void *)no_device, 0;
}
#define NONE(name) int name(void) { return NO_DEVICE; }
NONE(cuDevicePrimaryCtxRetain) NONE(cuGetErrorString) NONE(cuGraphKernelNodeGetParams)
NONE(cuGraphNodeGetType) NONE(cuLaunchKernel) NONE(cuModuleGetFunction) NONE(cuModuleLoadData)
NONE(cuModuleLoadDataEx) NONE(cuModuleUnload)
