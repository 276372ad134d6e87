// The few functions of the CUDA driver that a launch takes, found at run time: the library loads where there is no GPU.
#pragma once

#include <string>

namespace qc::cuda {

// Handles and results of the driver's interface, whose headers are not needed for so little.
using Result = int;  // 0 is success
using Context = void*;
using Module = void*;
using Function = void*;
using Stream = void*;

struct Driver {
  Result (*init)(unsigned flags);
  Result (*current_context)(Context* context);
  Result (*current_device)(int* device);
  Result (*device_attribute)(int* value, int attribute, int device);
  Result (*load_module)(Module* module, const void* image);
  Result (*module_function)(Function* function, Module module, const char* name);
  Result (*set_attribute)(Function function, int attribute, int value);
  Result (*launch)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments,
                   void** extra);
  Result (*error_text)(Result error, const char** text);
};

// The driver, loaded on the first call: libcuda.so.1, or the file that the environment variable QCOMPILER_CUDA_DRIVER
// names. Throws std::runtime_error that says why there is none.
const Driver& driver();

// Throws std::runtime_error with what the driver says of a result that is not success.
void require(Result result, const std::string& what);

}  // namespace qc::cuda
