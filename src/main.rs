//! The `alcove` command.

fn main() {}
