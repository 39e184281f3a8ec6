// For tests of the interpreter: bodies that must run under every schedule, and bodies in which it must find the error.
#pragma once
#include <functional>
#include <string>

#include "cpp/catch.hpp"
#include "simt/simt.h"

namespace simt::test {

inline void run_seeds(const Launch& launch, const std::function<void()>& body) {
  for (std::uint64_t seed = 0; seed < 16; ++seed) {
    CAPTURE(seed);
    run(launch, {.seed = seed}, body);
  }
}

/// The message of the Error, which must come under every seed.
inline std::string error_of(const Launch& launch, const std::function<void()>& body) {
  std::string text;
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    CAPTURE(seed);
    try {
      run(launch, {.seed = seed}, body);
      FAIL("no error");
    } catch (const Error& error) {
      text = error.what();
    }
  }
  return text;
}

inline bool contains(const std::string& text, const std::string& part) {
  UNSCOPED_INFO(text);
  return text.find(part) != std::string::npos;
}

inline void expect(bool right) {
  if (!right) throw std::logic_error("a wrong value");
}

}  // namespace simt::test
