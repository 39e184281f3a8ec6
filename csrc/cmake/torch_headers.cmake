# Sets AWQ_TORCH_INCLUDE to torch's include directory, without find_package(Torch): only the stable headers are used,
# so any torch from 2.10 on will do, and neither libtorch nor its CUDA toolkit is needed to compile.
#
# pip's build isolation hides the environment's torch through PYTHONPATH; `python -I` ignores that variable and so
# still sees it. uv builds a real virtual environment instead, hence the message below.
if(NOT AWQ_TORCH_INCLUDE)
  find_package(Python COMPONENTS Interpreter REQUIRED)
  set(_find_torch "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '', end='')")
  foreach(_flags "" "-I")
    if(NOT _torch)
      execute_process(COMMAND ${Python_EXECUTABLE} ${_flags} -c "${_find_torch}" OUTPUT_VARIABLE _torch ERROR_QUIET)
    endif()
  endforeach()
  if(NOT _torch)
    message(FATAL_ERROR
      "No torch found for ${Python_EXECUTABLE}. Its headers are needed to build. One of these works:\n"
      "  pip install 'torch>=2.10' && pip install .\n"
      "  pip install --no-build-isolation .    (with torch, scikit-build-core and pybind11 installed)\n"
      "With uv: uv pip install --no-build-isolation . , or name torch in extra-build-dependencies.\n"
      "Or pass the directory itself: -DAWQ_TORCH_INCLUDE=.../torch/include")
  endif()
  file(STRINGS "${_torch}/version.py" _version REGEX "^__version__")
  string(REGEX MATCH "[0-9]+\\.[0-9]+" _version "${_version}")
  if(_version VERSION_LESS 2.10)
    message(FATAL_ERROR "torch ${_version} in ${_torch} is too old: awq_ext needs the stable ABI of torch >= 2.10. "
      "Run: pip install 'torch>=2.10'")
  endif()
  set(AWQ_TORCH_INCLUDE "${_torch}/include" CACHE PATH "torch's include directory")
  message(STATUS "awq_ext: torch ${_version} headers in ${AWQ_TORCH_INCLUDE}")
endif()
if(NOT EXISTS "${AWQ_TORCH_INCLUDE}/torch/csrc/stable/library.h")
  message(FATAL_ERROR "AWQ_TORCH_INCLUDE=${AWQ_TORCH_INCLUDE} has no torch/csrc/stable/library.h")
endif()
