# awq_stub(cpu) makes an empty shared library whose soname is libtorch_cpu.so. Linking an ops library against it
# records the dependency by name alone, with no path: at run time the dynamic linker finds the libtorch that
# `import torch` has already loaded, and no build machine's torch can be picked by mistake. (torch loads its
# libraries RTLD_LOCAL, so a library without that dependency would not find their symbols.)
function(awq_stub device)
  set(_source "${CMAKE_CURRENT_BINARY_DIR}/stub_${device}.c")
  if(NOT EXISTS "${_source}")
    file(WRITE "${_source}" "")
  endif()
  add_library(stub_torch_${device} SHARED "${_source}")
  set_target_properties(stub_torch_${device} PROPERTIES OUTPUT_NAME torch_${device}
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stubs" LINK_DEPENDS_NO_SHARED ON)
endfunction()
