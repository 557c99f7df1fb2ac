// csrc/include/sparsekd.h over core/frozen: no exception leaves it, and every error is a line of text.
#include "sparsekd.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/frozen/file.h"

struct sparsekd_network {
  sparsekd::frozen::File file;
};

namespace {

using sparsekd::ShapeError;

constexpr int kMostThreads = 1024;
thread_local char last_error[512];

// What is in a file may be in the text: only what can be printed on one line stays.
void keep(const char* where, const char* what) noexcept {
  std::snprintf(last_error, sizeof last_error, "%.300s: %s", where, what);
  for (char* c = last_error; *c; ++c)
    if (static_cast<unsigned char>(*c) < 0x20 || *c == 0x7f) *c = '?';
}

template <class F, class R>
R guarded(const char* where, R failed, F body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    keep(where, "out of memory");
  } catch (const std::exception& e) {
    keep(where, e.what());
  } catch (...) {
    keep(where, "unknown error");
  }
  return failed;
}

const sparsekd::frozen::File& file_of(const sparsekd_network* network) {
  if (!network) throw ShapeError("network: expected one, got NULL");
  return network->file;
}

std::string content(const char* path) {
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  if (!path) throw ShapeError("path: expected a name, got NULL");
  const std::unique_ptr<std::FILE, Close> file(std::fopen(path, "rb"));
  if (!file) throw std::runtime_error(std::strerror(errno));
  std::string bytes;
  std::vector<char> part(1 << 20);
  while (const size_t count = std::fread(part.data(), 1, part.size(), file.get()))
    bytes.append(part.data(), count);
  if (std::ferror(file.get())) throw std::runtime_error(std::strerror(errno));
  return bytes;
}

sparsekd_network* made(std::string_view bytes) {
  return std::make_unique<sparsekd_network>(sparsekd_network{sparsekd::frozen::read_file(bytes)}).release();
}

int describe(const std::vector<std::vector<int64_t>>& shapes, int index, sparsekd_tensor* tensor) {
  if (index < 0 || static_cast<size_t>(index) >= shapes.size())
    throw ShapeError("index: expected one below " + std::to_string(shapes.size()) + ", got " +
                     std::to_string(index));
  if (!tensor) throw ShapeError("tensor: expected a place, got NULL");
  const std::vector<int64_t>& shape = shapes[index];
  int64_t length = 1;
  for (const int64_t size : shape) length *= size;
  *tensor = {SPARSEKD_FLOAT32, static_cast<int32_t>(shape.size()), shape.data(), length};
  return 0;
}

template <class T>
std::vector<T*> pointers(const char* name, T* const* list, size_t count, int64_t batch) {
  if (!list) throw ShapeError(std::string(name) + ": expected pointers, got NULL");
  for (size_t i = 0; i < count; ++i)
    if (!list[i] && batch > 0)
      throw ShapeError(std::string(name) + " " + std::to_string(i) + ": expected numbers, got NULL");
  return {list, list + count};
}

}  // namespace

const char* sparsekd_error(void) { return last_error; }

sparsekd_network* sparsekd_load(const char* path) {
  return guarded(path ? path : "sparsekd_load", static_cast<sparsekd_network*>(nullptr),
                 [&] { return made(content(path)); });
}

sparsekd_network* sparsekd_load_bytes(const void* bytes, size_t size) {
  return guarded("sparsekd_load_bytes", static_cast<sparsekd_network*>(nullptr), [&] {
    return made(bytes ? std::string_view(static_cast<const char*>(bytes), size) : std::string_view());
  });
}

void sparsekd_free(sparsekd_network* network) { delete network; }

int sparsekd_inputs(const sparsekd_network* network) {
  return guarded("sparsekd_inputs", -1, [&] { return static_cast<int>(file_of(network).inputs.size()); });
}

int sparsekd_outputs(const sparsekd_network* network) {
  return guarded("sparsekd_outputs", -1, [&] { return static_cast<int>(file_of(network).outputs.size()); });
}

int sparsekd_input(const sparsekd_network* network, int index, sparsekd_tensor* tensor) {
  return guarded("sparsekd_input", -1, [&] { return describe(file_of(network).inputs, index, tensor); });
}

int sparsekd_output(const sparsekd_network* network, int index, sparsekd_tensor* tensor) {
  return guarded("sparsekd_output", -1, [&] { return describe(file_of(network).outputs, index, tensor); });
}

int sparsekd_run(const sparsekd_network* network, const float* const* inputs, float* const* outputs,
                 int64_t batch, int threads) {
  return guarded("sparsekd_run", -1, [&] {
    const sparsekd::frozen::File& file = file_of(network);
    if (batch < 0) throw ShapeError("batch: expected 0 or more, got " + std::to_string(batch));
    if (threads < 1 || threads > kMostThreads)
      throw ShapeError("threads: expected 1 to " + std::to_string(kMostThreads) + ", got " +
                       std::to_string(threads));
    const auto in = pointers<const float>("input", inputs, file.inputs.size(), batch);
    const auto out = pointers<float>("output", outputs, file.outputs.size(), batch);
    file.network->run(in, out, batch, threads);
    return 0;
  });
}
