// Bindings of core/frozen/network.h.
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "core/frozen/network.h"

namespace sparsekd {
namespace {

using frozen::Network;
using frozen::Node;

template <class T>
std::vector<T> copy_of(const char* name, const py::dict& lists) {
  if (!lists.contains(name)) return {};
  const Array a = lists[name].cast<Array>();
  check_dims(name, a, 1);
  const T* from = vector_of<const T>(name, a, a.shape(0));
  return {from, from + a.shape(0)};
}

// (records [nodes, kRecord] int32, a dict of lists for each node, outputs)
std::unique_ptr<Network> make(const Array& records, const std::vector<py::dict>& lists,
                              std::vector<int32_t> outputs) {
  expect_shape("records", records, {static_cast<int64_t>(lists.size()), frozen::kRecord});
  const int32_t* record = rows_of<const int32_t>("records", records);
  std::vector<Node> nodes;
  for (const py::dict& of : lists) {
    Node node = frozen::decode(record);
    record += frozen::kRecord;
    node.crow = copy_of<int32_t>("crow", of);
    node.col = copy_of<int32_t>("col", of);
    if (of.contains("values") && of["values"].cast<Array>().type() == Type::kInt8)
      node.codes = copy_of<int8_t>("values", of);
    else
      node.values = copy_of<float>("values", of);
    node.scale = copy_of<float>("scale", of);
    node.bias = copy_of<float>("bias", of);
    nodes.push_back(std::move(node));
  }
  py::gil_scoped_release release;
  return std::make_unique<Network>(std::move(nodes), std::move(outputs));
}

template <class T>
T* images(const std::string& name, const Array& a, int64_t batch, int64_t length) {
  T* data = data_of<T>(name.c_str(), a);
  int64_t expected = 1;
  bool contiguous = true;
  for (int i = a.ndim() - 1; i >= 0; --i) {
    if (a.shape(i) > 1 && a.stride(i) != expected) contiguous = false;
    expected *= a.shape(i);
  }
  if (a.ndim() < 1 || a.shape(0) != batch || expected != batch * length || !contiguous)
    throw ShapeError(name + ": expected a contiguous batch of " + std::to_string(batch) + " times " +
                     std::to_string(length) + " numbers, got shape " + shape_text(a));
  return data;
}

void run(const Network& network, const std::vector<Array>& in, const std::vector<Array>& out, int threads,
         int64_t together) {
  if (in.size() != network.inputs().size() || out.size() != network.outputs().size())
    throw ShapeError("network: expected " + std::to_string(network.inputs().size()) + " inputs and " +
                     std::to_string(network.outputs().size()) + " outputs");
  check_threads(threads);
  const int64_t batch = in[0].ndim() ? in[0].shape(0) : -1;
  std::vector<const float*> from;
  std::vector<float*> to;
  for (size_t i = 0; i < in.size(); ++i)
    from.push_back(images<const float>("input " + std::to_string(i), in[i], batch, network.input_length(i)));
  for (size_t i = 0; i < out.size(); ++i)
    to.push_back(images<float>("output " + std::to_string(i), out[i], batch, network.output_length(i)));
  py::gil_scoped_release release;
  network.run(from, to, batch, threads, together);
}

// [channels, height, width], or [tokens, channels]
py::tuple form(const Network& network, int32_t node) {
  const frozen::Shape& s = network.nodes()[node].shape;
  if (network.tokens(node)) return py::make_tuple(s.width, s.channels);
  return py::make_tuple(s.channels, s.height, s.width);
}

py::list forms(const Network& network, const std::vector<int32_t>& nodes) {
  py::list shapes;
  for (const int32_t node : nodes) shapes.append(form(network, node));
  return shapes;
}

}  // namespace

void bind_frozen(py::module_& m) {
  py::class_<Network>(m, "FrozenNetwork")
      .def(py::init(&make), py::arg("records"), py::arg("lists"), py::arg("outputs"))
      .def("run", &run, py::arg("inputs"), py::arg("outputs"), py::arg("threads"), py::arg("together") = 0)
      .def_property_readonly("input_shapes", [](const Network& n) { return forms(n, n.inputs()); })
      .def_property_readonly("output_shapes", [](const Network& n) { return forms(n, n.outputs()); })
      .def_property_readonly("products", &Network::products);
}

}  // namespace sparsekd
