//! x86-64: CPUID, MSRs and the registers a vCPU starts with.

pub mod cpuid;
pub mod msrs;
pub mod regs;
pub mod topology;
