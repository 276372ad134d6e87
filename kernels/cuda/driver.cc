#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace qc::cuda {
namespace {

template <typename F>
void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("the CUDA driver has no function ") + name);
}

std::string text_of(const Driver& driver, Result error) {
  const char* text = nullptr;
  driver.error_text(error, &text);
  return text ? text : "unknown error";
}

// Never unloaded: modules and functions live as long as the process.
Driver load() {
  const char* named = std::getenv("QCOMPILER_CUDA_DRIVER");
  const std::string file = named && *named ? named : "libcuda.so.1";
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("no CUDA driver: " + std::string(dlerror()));
  Driver found{};
  find(library, "cuInit", found.init);
  find(library, "cuCtxGetCurrent", found.current_context);
  find(library, "cuCtxGetDevice", found.current_device);
  find(library, "cuDeviceGetAttribute", found.device_attribute);
  find(library, "cuModuleLoadData", found.load_module);
  find(library, "cuModuleGetFunction", found.module_function);
  find(library, "cuFuncSetAttribute", found.set_attribute);
  find(library, "cuLaunchKernel", found.launch);
  find(library, "cuGetErrorString", found.error_text);
  if (const Result result = found.init(0))
    throw std::runtime_error("the CUDA driver does not start: " + text_of(found, result));
  return found;
}

}  // namespace

const Driver& driver() {
  static const Driver found = load();  // tried again after a failure
  return found;
}

void require(Result result, const std::string& what) {
  if (result == 0) return;
  throw std::runtime_error(what + ": " + text_of(driver(), result) + " (CUDA error " + std::to_string(result) + ")");
}

}  // namespace qc::cuda
