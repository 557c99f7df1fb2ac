#include "core/frozen/file.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "core/error.h"
#include "core/frozen/json.h"
#include "core/frozen/sha256.h"

namespace sparsekd::frozen {
namespace {

constexpr std::string_view kFormat = "sparsekd frozen 1";
constexpr uint64_t kMostHeader = uint64_t{1} << 22;  // bytes: a node takes about 300

void require(bool ok, const std::string& what) {
  if (!ok) throw ShapeError(what);
}

const Json& get(const Json& object, std::string_view key, Json::Kind kind) {
  const Json* const value = object.find(key);
  require(value && value->kind == kind, "header: no " + std::string(key));
  return *value;
}

std::vector<int64_t> numbers(const Json& list, const char* what) {
  std::vector<int64_t> found;
  for (const Json& item : list.items) {
    require(item.kind == Json::Kind::kNumber && item.number >= 0,
            std::string(what) + ": expected whole numbers");
    found.push_back(item.number);
  }
  require(list.kind == Json::Kind::kArray, std::string(what) + ": expected a list");
  return found;
}

// Product of the sizes, or -1 where it exceeds what a file can hold.
int64_t product(const std::vector<int64_t>& sizes) {
  int64_t all = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(all, size, &all) || all > (int64_t{1} << 40)) return -1;
  return all;
}

struct Dtype {
  std::string_view name, torch_name;
  int64_t bytes;
};
constexpr Dtype kDtypes[] = {{"F32", "torch.float32", sizeof(float)},
                             {"I32", "torch.int32", sizeof(int32_t)},
                             {"I8", "torch.int8", 1},
                             {"I16", "torch.int16", sizeof(int16_t)}};

template <class T>
constexpr std::string_view kNameOf = "F32";
template <>
constexpr std::string_view kNameOf<int32_t> = "I32";
template <>
constexpr std::string_view kNameOf<int16_t> = "I16";
template <>
constexpr std::string_view kNameOf<int8_t> = "I8";

struct Tensor {
  const Dtype* dtype;
  std::vector<int64_t> shape;
  std::string_view bytes;
};

// By name, in the order in which they are hashed.
using Tensors = std::map<std::string, Tensor>;

// The tensors must fill the bytes after the header, with no gap and nothing twice.
Tensors tensors_of(const Json& header, std::string_view data) {
  Tensors found;
  std::map<int64_t, int64_t> places;
  for (const auto& [name, about] : header.members) {
    if (name == "__metadata__") continue;
    const std::string& text = get(about, "dtype", Json::Kind::kString).text;
    const Dtype* const dtype =
        std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& d) { return d.name == text; });
    require(dtype != std::end(kDtypes), name + ": expected F32, I32, I16 or I8");
    std::vector<int64_t> shape = numbers(get(about, "shape", Json::Kind::kArray), "shape");
    const std::vector<int64_t> place =
        numbers(get(about, "data_offsets", Json::Kind::kArray), "data_offsets");
    const int64_t count = product(shape);
    require(place.size() == 2 && place[0] <= place[1] && place[1] <= static_cast<int64_t>(data.size()) &&
                count >= 0 && place[1] - place[0] == dtype->bytes * count,
            name + ": its offsets do not fit the file");
    if (count) require(places.emplace(place[0], place[1]).second, name + ": overlaps another tensor");
    found[name] = {dtype, std::move(shape), data.substr(place[0], place[1] - place[0])};
  }
  int64_t end = 0;
  for (const auto& [from, to] : places) {
    require(from == end, "header: tensors with gaps or overlaps");
    end = to;
  }
  require(end == static_cast<int64_t>(data.size()), "header: bytes that belong to no tensor");
  return found;
}

// As `state_hash` in sparsekd/train/checkpoint.py, which prints shapes as Python does.
std::string hash(const Tensors& tensors) {
  Sha256 digest;
  for (const auto& [name, tensor] : tensors) {
    std::string text = name + "|" + std::string(tensor.dtype->torch_name) + "|(";
    for (size_t i = 0; i < tensor.shape.size(); ++i)
      text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
    text += tensor.shape.size() == 1 ? ",)|" : ")|";
    digest.update(text.data(), text.size());
    digest.update(tensor.bytes.data(), tensor.bytes.size());
  }
  return digest.hex();
}

template <class T>
std::vector<T> copy_of(const std::string& name, const Tensor& tensor, size_t axes) {
  require(tensor.dtype->name == kNameOf<T> && tensor.shape.size() == axes,
          name + ": expected another type or number of axes");
  std::vector<T> list(tensor.bytes.size() / sizeof(T));
  if (!list.empty()) std::memcpy(list.data(), tensor.bytes.data(), tensor.bytes.size());
  return list;
}

std::unique_ptr<const Network> network_of(const Tensors& tensors) {
  const auto records = tensors.find("records"), outputs = tensors.find("outputs");
  require(records != tensors.end() && outputs != tensors.end(), "header: no records or no outputs");
  const std::vector<int32_t> rows = copy_of<int32_t>("records", records->second, 2);
  require(records->second.shape[1] == kRecord, "records: expected rows of " + std::to_string(kRecord));
  std::vector<Node> nodes;
  for (size_t at = 0; at < rows.size(); at += kRecord) nodes.push_back(decode(rows.data() + at));
  std::map<std::string, size_t> numbers;
  for (size_t i = 0; i < nodes.size(); ++i) numbers[std::to_string(i)] = i;
  for (const auto& [name, tensor] : tensors) {
    if (name == "records" || name == "outputs") continue;
    const auto number = numbers.find(name.substr(0, name.find('.')));
    const std::string list = name.substr(std::min(name.find('.'), name.size()));
    require(number != numbers.end(), name + ": not a tensor of a frozen network");
    Node& node = nodes[number->second];
    if (list == ".crow") {
      node.crow = copy_of<int32_t>(name, tensor, 1);
    } else if (list == ".col" && tensor.dtype->name == "I16") {
      const std::vector<int16_t> narrow = copy_of<int16_t>(name, tensor, 1);
      node.col.assign(narrow.begin(), narrow.end());
    } else if (list == ".col") {
      node.col = copy_of<int32_t>(name, tensor, 1);
    } else if (list == ".values" && tensor.dtype->name == "I8") {
      node.codes = copy_of<int8_t>(name, tensor, 1);
    } else if (list == ".values") {
      node.values = copy_of<float>(name, tensor, 1);
    } else if (list == ".bias") {
      node.bias = copy_of<float>(name, tensor, 1);
    } else if (list == ".scale") {
      node.scale = copy_of<float>(name, tensor, 1);
    } else {
      require(false, name + ": not a tensor of a frozen network");
    }
  }
  return std::make_unique<const Network>(std::move(nodes), copy_of<int32_t>("outputs", outputs->second, 1));
}

}  // namespace

File read_file(std::string_view bytes) {
  uint64_t size = 0;
  for (int i = 0; i < 8 && bytes.size() >= 8; ++i)
    size |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[i])) << 8 * i;
  require(size > 0 && size <= kMostHeader && size <= bytes.size() - 8, "not a safetensors file, or cut off");
  const Json header = parse_json(bytes.substr(8, size));
  const Json* const metadata = header.find("__metadata__");
  const Json* const text = metadata ? metadata->find("sparsekd") : nullptr;
  const Json about = text ? parse_json(text->text) : Json();
  const Json* const format = about.find("format");
  require(format && format->text == kFormat, "expected a file of save_frozen (" + std::string(kFormat) + ")");
  const Tensors tensors = tensors_of(header, bytes.substr(8 + size));
  require(get(about, "sha256", Json::Kind::kString).text == hash(tensors),
          "damaged, its tensors do not match the stored SHA-256");
  File file;
  file.network = network_of(tensors);
  for (const Json& shape : get(about, "inputs", Json::Kind::kArray).items)
    file.inputs.push_back(numbers(shape, "inputs"));
  file.outputs.push_back(numbers(get(about, "output", Json::Kind::kArray), "output"));
  const Network& network = *file.network;
  require(file.inputs.size() == network.inputs().size() && file.outputs.size() == network.outputs().size(),
          "header: a shape for every input and output was expected");
  for (size_t i = 0; i < file.inputs.size(); ++i)
    require(product(file.inputs[i]) == network.input_length(i), "inputs: not the network's shapes");
  for (size_t i = 0; i < file.outputs.size(); ++i)
    require(product(file.outputs[i]) == network.output_length(i), "output: not the network's shape");
  return file;
}

}  // namespace sparsekd::frozen
