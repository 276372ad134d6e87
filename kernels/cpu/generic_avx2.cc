// The same kernels where compilers may use AVX2.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2")
#define QC_NAMESPACE generic_avx2
#include "generic.inc"
#pragma GCC pop_options
#endif
