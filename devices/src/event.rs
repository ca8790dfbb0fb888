//! What a device tells the machine that owns it.

/// Something that a guest asked for, or went through, that ends or marks the machine's run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest reset the machine (i8042 pulse, ACPI reset register).
    Reset,
    /// The guest powered the machine off.
    PowerOff,
    /// The guest wrote this status to the debug-exit port.
    Exit(u8),
    /// The guest's kernel panicked (pvpanic bit 0).
    Panicked,
    /// The guest's kernel panicked and its crash kernel takes over (pvpanic bit 1).
    CrashLoaded,
    /// The user asked at the console to end the guest (Ctrl-a x).
    Quit,
}

/// Where devices post [`MachineEvent`]s. Any thread may call it; it neither blocks nor fails.
pub trait MachineEvents: Send + Sync {
    /// Hands `event` to the machine.
    fn post(&self, event: MachineEvent);
}
