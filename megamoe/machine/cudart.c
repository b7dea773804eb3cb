// A CUDA runtime without a GPU: every call succeeds, a launch is handed to whoever set the hook. It
// is linked into a kernel library, whose own host entry then runs anywhere.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { unsigned x, y, z; } Dim;
typedef struct { int id, pad; union { Dim cluster; char raw[64]; } value; } Attribute;
typedef struct { Dim grid, block; size_t shared; void *stream; Attribute *attributes; unsigned count; } Config;
typedef void (*Hook)(const char *kernel, const unsigned *sizes, size_t shared, void **arguments);
enum { CLUSTER_DIMENSION = 4, SHARED_BYTES = 232448 };

static Hook hook;
void machine_set_hook(Hook h) { hook = h; }

int cudaLaunchKernelExC(const Config *c, const void *kernel, void **arguments) {
  Dim cluster = {1, 1, 1};
  for (unsigned i = 0; i < c->count; i++)
    if (c->attributes[i].id == CLUSTER_DIMENSION) cluster = c->attributes[i].value.cluster;
  unsigned sizes[] = {c->grid.x, c->grid.y, c->grid.z, c->block.x, c->block.y, c->block.z,
                      cluster.x * cluster.y * cluster.z};
  if (!hook) return 100;  // no device
  hook(kernel, sizes, c->shared, arguments);
  return 0;
}
int cudaLibraryLoadData(void **library) { return *library = &hook, 0; }
int cudaLibraryGetKernel(void **kernel, void *library, const char *name) { return *kernel = strdup(name), 0; }
int cudaGetDevice(int *device) { return *device = 0; }
int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaDriverGetVersion(int *version) { return *version = 14000, 0; }
int cudaDeviceGetAttribute(int *value, int attribute) {
  return *value = attribute == 75 ? 9 : attribute == 76 ? 0 : SHARED_BYTES, 0;  // capability 9.0
}
static int succeed(void) { return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version, uint64_t flags, int *status) {
  if (status) *status = 0;
  return *entry = (void *)succeed, 0;
}
const char *cudaGetErrorName(int error) { return "error"; }
const char *cudaGetErrorString(int error) { return "an error of the machine"; }
// What the DSL's runtime refers to besides.
#define F(name) int name(void) { return 0; }
F(cudaDeviceSynchronize) F(cudaEventCreate) F(cudaEventCreateWithFlags) F(cudaEventDestroy)
F(cudaEventElapsedTime) F(cudaEventQuery) F(cudaEventRecord) F(cudaEventRecordWithFlags)
F(cudaEventSynchronize) F(cudaFree) F(cudaFreeAsync) F(cudaFreeHost) F(cudaFuncSetAttribute)
F(cudaGetDeviceProperties) F(cudaGetLastError) F(cudaGraphAddKernelNode) F(cudaGraphCreate)
F(cudaGraphDestroy) F(cudaGraphExecDestroy) F(cudaGraphInstantiate) F(cudaGraphKernelNodeGetAttribute)
F(cudaGraphKernelNodeSetAttribute) F(cudaGraphLaunch) F(cudaKernelSetAttributeForDevice)
F(cudaLibraryGetGlobal) F(cudaLibraryGetKernelCount) F(cudaLibraryGetManaged)
F(cudaLibraryGetUnifiedFunction) F(cudaLibraryLoadFromFile) F(cudaLibraryUnload) F(cudaMalloc)
F(cudaMallocAsync) F(cudaMallocHost) F(cudaMallocManaged) F(cudaMemcpy) F(cudaMemcpy3D)
F(cudaMemcpy3DAsync) F(cudaMemcpyAsync) F(cudaMemset) F(cudaMemsetAsync)
F(cudaOccupancyMaxActiveBlocksPerMultiprocessor) F(cudaProfilerStart) F(cudaProfilerStop)
F(cudaSetDevice) F(cudaStreamAddCallback) F(cudaStreamBeginCapture) F(cudaStreamCreate)
F(cudaStreamDestroy) F(cudaStreamEndCapture) F(cudaStreamSynchronize) F(cudaStreamWaitEvent)
