// A C++ program without Python: loads the operator library, runs a TorchScript module that uses it, and calls the
// operator through the dispatcher. Arguments: libawq_ops.so, the module, its input, the expected output (torch.save).
#include <dlfcn.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

at::Tensor read_tensor(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return torch::jit::pickle_load(bytes).toTensor();
}

at::Tensor call_linear(const torch::jit::Module& layer, const at::Tensor& x) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("awq_ext::linear", "");
  torch::jit::Stack stack{x};
  for (const char* name : {"qweight", "scales", "qzeros", "bias", "group_size", "layout"})
    stack.push_back(layer.attr(name));
  stack.emplace_back(std::string("exact"));
  op.callBoxed(&stack);
  return stack.at(0).toTensor();
}

int check(bool right, const char* what) {
  std::cout << what << (right ? ": right" : ": WRONG") << std::endl;
  return right ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: " << argv[0] << " libawq_ops.so module.pt input.pt expected.pt" << std::endl;
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) == nullptr) {
    std::cerr << dlerror() << std::endl;
    return 2;
  }
  const torch::NoGradGuard no_grad;
  torch::jit::Module layer = torch::jit::load(argv[2]);
  const at::Tensor x = read_tensor(argv[3]), expected = read_tensor(argv[4]);
  int failures = check(torch::equal(layer.forward({x}).toTensor(), expected), "output of the TorchScript module");
  failures += check(torch::equal(call_linear(layer, x), expected), "output through the dispatcher");
  try {
    call_linear(layer, x.narrow(-1, 0, 1));
    failures += check(false, "refusal of a wrong shape");
  } catch (const std::exception& error) {
    const bool named = std::string(error.what()).find("awq_ext::linear: x must be") != std::string::npos;
    failures += check(named, "refusal of a wrong shape");
  }
  return failures;
}
