//! What depends on the processor: the only home of `target_arch`.

pub mod x86_64;
