#include "launch.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "driver.h"

namespace qc::cuda {
namespace {

// A compiled kernel; see kernels/triton/compiler.py, which writes the table.
struct Image {
  Kind kind;
  int bits, entry;
  bool half;
  int block_m, block_n, warps;
  int target;  // compute capability times ten, or 0 for PTX
  const char* symbol;
  int shared;  // bytes
  size_t place;
};

#ifdef QC_CUDA_IMAGES
__asm__(
    ".section .rodata\n.balign 16\nqc_cuda_images:\n.incbin \"" QC_CUDA_IMAGES "/images.bin\"\n.previous");
extern "C" const unsigned char qc_cuda_images[];
const Image kImages[] = {
#include "images.inc"
};
const Image* const kEnd = std::end(kImages);
const void* code(const Image& image) { return qc_cuda_images + image.place; }
#else
const Image* const kImages = nullptr;
const Image* const kEnd = nullptr;
const void* code(const Image&) { return nullptr; }
#endif

constexpr int kMajor = 75, kMinor = 76, kDynamicShared = 8;  // of CUdevice_attribute and CUfunction_attribute
constexpr int kFreeShared = 48 * 1024;                       // what a launch may ask for without saying so before
constexpr int64_t kGridRows = 65535;

// How well an image's target fits a processor; less than 0 if it does not run there. Code runs on later processors of
// the same generation too, but for that of generations 9 and up, which is made for one; PTX runs on all later ones.
int fit(int target, int capability) {
  if (target == capability) return 1000;
  if (target == 0) return capability >= 80 ? 0 : -1;
  return target / 10 == capability / 10 && target < capability && target < 90 ? target : -1;
}

int capability() {
  int device = 0, major = 0, minor = 0;
  require(driver().current_device(&device), "no CUDA device is current");
  require(driver().device_attribute(&major, kMajor, device), "asking for the compute capability");
  require(driver().device_attribute(&minor, kMinor, device), "asking for the compute capability");
  return major * 10 + minor;
}

// The best image: the smallest blocks that hold all rows, or the largest there are; a block of one row takes anything.
const Image& choose(const Product& p, int capability, bool aligned) {
  const Image* best = nullptr;
  const auto better = [&](const Image& image, const Image& than) {
    const bool holds = image.block_m >= p.count, held = than.block_m >= p.count;
    if (holds != held) return holds;
    if (image.block_m != than.block_m) return (image.block_m < than.block_m) == holds;
    return fit(image.target, capability) > fit(than.target, capability);
  };
  for (const Image* image = kImages; image != kEnd; ++image) {
    if (image->kind != p.kind || image->bits != p.bits || image->entry != p.entry || image->half != p.half) continue;
    if (fit(image->target, capability) < 0 || (image->block_m > 1 && !aligned)) continue;
    if (best == nullptr || better(*image, *best)) best = image;
  }
  if (best == nullptr)
    throw std::runtime_error("no kernel for CUDA was built for entries of " + std::to_string(p.entry) +
                             " columns and compute capability " + std::to_string(capability / 10) + "." +
                             std::to_string(capability % 10));
  return *best;
}

// The kernel in the current context, loaded once.
Function function(const Image& image) {
  static std::mutex mutex;
  static std::map<std::pair<Context, const Image*>, Function> loaded;
  Context context = nullptr;
  require(driver().current_context(&context), "no CUDA context is current");
  const std::lock_guard<std::mutex> guard(mutex);
  Function& found = loaded[{context, &image}];
  if (found == nullptr) {
    Module module = nullptr;
    Function made = nullptr;
    require(driver().load_module(&module, code(image)), "loading a kernel");
    require(driver().module_function(&made, module, image.symbol), "loading a kernel");
    if (image.shared > kFreeShared)
      require(driver().set_attribute(made, kDynamicShared, image.shared), "asking for shared memory");
    found = made;
  }
  return found;
}

bool multiple(const void* pointer, uintptr_t of) { return reinterpret_cast<uintptr_t>(pointer) % of == 0; }

int32_t narrow(int64_t value, const char* what) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max())
    throw std::runtime_error(std::string(what) + " = " + std::to_string(value) + " is more than kernels for CUDA take");
  return static_cast<int32_t>(value);
}

}  // namespace

bool built() { return kImages != kEnd; }

std::string targets() {
  std::set<int> all;
  for (const Image* image = kImages; image != kEnd; ++image) all.insert(image->target);
  std::string found;
  for (const int target : all) found += target ? "sm_" + std::to_string(target) + " " : "";
  return found + (all.count(0) ? "PTX" : "");
}

std::string problem() {
  if (!built()) return "no kernels for CUDA were built";
  try {
    driver();
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

void launch(const Product& p, void* stream) {
  if (p.count == 0 || p.rows == 0) return;
  if (!multiple(p.codes, 16)) throw std::runtime_error("codes do not begin at a multiple of 16 bytes");
  const Image& image = choose(p, capability(), multiple(p.a, 16) && multiple(p.y, 16) && p.columns % 16 == 0);
  Function kernel = function(image);

  const void *a = p.a, *codes = p.codes, *scales = p.scales, *values = p.values, *zero_codes = p.zero_codes;
  const void *starts = p.starts, *bias = p.bias, *scratch = nullptr, *profile = nullptr;
  void* y = p.y;
  int32_t count = narrow(p.count, "M"), rows = narrow(p.rows, "N"), columns = narrow(p.columns, "K");
  narrow(p.groups * p.group_size, "K with groups filled up");
  int32_t groups = narrow(p.groups, "G"), octets = narrow(p.group_size / (8 * p.entry), "g");
  int32_t entries = narrow(p.entries, "the number of entries"), zeros_are_codes = p.zeros_are_codes;
  int32_t zero_step = p.zero_each, start_step = p.starts_each, bias_step = p.bias_each;
  // Those of ARGUMENTS in kernels/triton/matmul.py, and two that Triton adds for memory which our kernels do not use.
  void* arguments[] = {&a,       &codes,   &scales,  &values, &zero_codes,      &starts,    &bias,       &y,
                       &count,   &rows,    &columns, &groups, &octets,          &entries,   &zeros_are_codes,
                       &zero_step, &start_step, &bias_step, &scratch, &profile};
  const size_t size = p.half ? 2 : 4;
  const int64_t step = kGridRows * image.block_m;
  for (int64_t first = 0; first < p.count; first += step) {
    count = static_cast<int32_t>(std::min(step, p.count - first));
    a = static_cast<const char*>(p.a) + first * p.columns * size;
    y = static_cast<char*>(p.y) + first * p.rows * size;
    const auto programs = [](int64_t all, int64_t block) { return static_cast<unsigned>((all + block - 1) / block); };
    require(driver().launch(kernel, programs(p.rows, image.block_n), programs(count, image.block_m), 1,
                            static_cast<unsigned>(image.warps) * 32, 1, 1, static_cast<unsigned>(image.shared), stream,
                            arguments, nullptr),
            "launching a kernel");
  }
}

}  // namespace qc::cuda
