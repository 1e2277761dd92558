class HotPath:
    descriptor: int
    is_hot: bool
    line_bytes: int
    hot_lines: int
    bytes_in: int
    bytes_out: int
    @property
    def on_readable(self) -> HotPath: ...
    def __call__(self) -> None: ...

def accept(listener: int) -> tuple[int, tuple[str, int] | tuple[str, int, int, int]] | None: ...
