// The Python module _native, which is empty: importing it loads the library, whose files register their ops.
#include <Python.h>

PyMODINIT_FUNC PyInit__native(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
