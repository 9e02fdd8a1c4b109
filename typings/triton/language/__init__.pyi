from typing import Any, TypeAlias

class dtype: ...

constexpr: TypeAlias = Any
float16: dtype
bfloat16: dtype
float32: dtype
int32: dtype
int64: dtype

def __getattr__(name: str) -> Any: ...
