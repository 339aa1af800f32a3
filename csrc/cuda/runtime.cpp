// runtime.h by CUDA's runtime, linked statically. Without a driver only its calls fail.
#include "runtime.h"

#include <cuda_runtime_api.h>

namespace kron {
namespace {

const char *text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

} // namespace

const char *device_properties(int64_t index, Device &device) {
  int major, multiprocessors, shared;
  const int i = int(index);
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
  if (!error)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, i);
  if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, i);
  if (error) {
    cudaGetLastError(); // the error is reported here; clear it
    return text(error);
  }
  if (major < 8) return "the CUDA kernels need compute capability 8.0 or later";
  device = {multiprocessors, shared};
  return nullptr;
}

const char *run(const Kernel &kernel, const Launch &launch, const void *arguments, size_t) {
  const int usual = 48 * 1024; // anything above must be requested
  cudaError_t error = cudaSuccess;
  if (launch.shared > usual)
    error = cudaFuncSetAttribute(kernel.entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(launch.shared));
  void *parameters[] = {const_cast<void *>(arguments)};
  if (!error)
    error = cudaLaunchKernel(kernel.entry, dim3(unsigned(launch.grid)),
                             dim3(unsigned(launch.threads)), parameters, size_t(launch.shared),
                             static_cast<cudaStream_t>(launch.stream));
  if (error) cudaGetLastError();
  return text(error);
}

OnDevice::OnDevice(int64_t index) : error(nullptr), before(-1) {
  int current;
  cudaError_t result = cudaGetDevice(&current);
  if (!result && current != int(index)) {
    result = cudaSetDevice(int(index));
    if (!result) before = current;
  }
  if (result) cudaGetLastError();
  error = text(result);
}

OnDevice::~OnDevice() {
  if (before >= 0) cudaSetDevice(before);
}

} // namespace kron
