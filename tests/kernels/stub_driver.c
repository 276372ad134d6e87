/* A CUDA driver that runs nothing: it says which processor it has, and writes down what is loaded and launched, a line of
 * JSON each, into the file that STUB_LOG names. STUB_CAPABILITY is the compute capability times ten; STUB_FAIL names a
 * function that fails. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fails(const char* name) {
  const char* which = getenv("STUB_FAIL");
  return which && strcmp(which, name) == 0 ? 700 : 0;
}

static FILE* log_file(void) { return fopen(getenv("STUB_LOG"), "a"); }

/* FNV-1a of a whole image: a cubin ends behind its table of sections, PTX at a zero. */
static uint64_t digest(const unsigned char* image, size_t* size) {
  if (memcmp(image, "\177ELF", 4) == 0) {
    uint64_t sections, programs;
    uint16_t section_size, section_count, program_size, program_count;
    memcpy(&programs, image + 0x20, 8);
    memcpy(&sections, image + 0x28, 8);
    memcpy(&program_size, image + 0x36, 2);
    memcpy(&program_count, image + 0x38, 2);
    memcpy(&section_size, image + 0x3a, 2);
    memcpy(&section_count, image + 0x3c, 2);
    const size_t first = sections + (size_t)section_size * section_count;
    const size_t second = programs + (size_t)program_size * program_count;
    *size = first > second ? first : second;
  } else {
    *size = strlen((const char*)image) + 1;
  }
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < *size; ++i) hash = (hash ^ image[i]) * 1099511628211u;
  return hash;
}

int cuInit(unsigned flags) { return flags ? 1 : fails("cuInit"); }
int cuCtxGetCurrent(void** context) { *context = (void*)16; return fails("cuCtxGetCurrent"); }
int cuCtxGetDevice(int* device) { *device = 3; return fails("cuCtxGetDevice"); }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = atoi(getenv("STUB_CAPABILITY"));
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  return device == 3 ? 0 : 101;
}
int cuModuleLoadData(void** module, const void* image) {
  size_t size;
  const uint64_t hash = digest(image, &size);
  FILE* file = log_file();
  fprintf(file, "{\"module\": \"%016llx\", \"size\": %zu, \"align\": %d}\n", (unsigned long long)hash, size,
          (int)((uintptr_t)image % 16));
  fclose(file);
  *module = (void*)(uintptr_t)hash;
  return fails("cuModuleLoadData");
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  FILE* file = log_file();
  fprintf(file, "{\"function\": \"%s\"}\n", name);
  fclose(file);
  *function = module;
  return fails("cuModuleGetFunction");
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  FILE* file = log_file();
  fprintf(file, "{\"attribute\": %d, \"value\": %d}\n", attribute, value);
  fclose(file);
  return function ? fails("cuFuncSetAttribute") : 1;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  FILE* file = log_file();
  fprintf(file, "{\"launch\": \"%016llx\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %llu, ",
          (unsigned long long)(uintptr_t)function, gx, gy, gz, bx, by, bz, shared,
          (unsigned long long)(uintptr_t)stream);
  fprintf(file, "\"extra\": %d, \"arguments\": [", extra != NULL);
  for (int i = 0; i < 20; ++i) { /* eight pointers, ten numbers, two pointers */
    const long long value = i < 8 || i >= 18 ? *(long long*)arguments[i] : *(int*)arguments[i];
    fprintf(file, "%s%lld", i ? ", " : "", value);
  }
  fprintf(file, "]}\n");
  fclose(file);
  return fails("cuLaunchKernel");
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 700 ? "what the stub was told to say" : NULL;
  return 0;
}
