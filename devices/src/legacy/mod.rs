//! The PC's own chips.
