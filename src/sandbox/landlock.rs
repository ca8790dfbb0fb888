//! Which files a process may open and whom it may talk to: from some point on, none and no one.
//!
//! What is open stays open, in the mode in which it was opened.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};

/// The newest interface whose rights are asked for. Of an older kernel it gets what there is.
const NEWEST: ABI = ABI::V6;

/// How much a kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforced {
    /// Everything that is asked for.
    All,
    /// A part: the kernel has an older Landlock.
    Part,
    /// Nothing: the kernel has none.
    Nothing,
}

/// Takes from the calling thread, and from those it starts from now on, for ever: every way to
/// open, make, remove or rename a file; to bind or connect TCP sockets (ABI 4), to use device
/// ioctls of files yet to be opened (5), to reach abstract sockets of others or send them signals
/// (6). The thread must have renounced new privileges.
///
/// # Errors
/// The kernel has Landlock and refuses it all the same.
pub fn open_nothing_more() -> io::Result<Enforced> {
    let restrict = || -> Result<RulesetStatus, RulesetError> {
        let rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?;
        Ok(rules.create()?.restrict_self()?.ruleset)
    };
    match restrict() {
        Ok(RulesetStatus::FullyEnforced) => Ok(Enforced::All),
        Ok(RulesetStatus::PartiallyEnforced) => Ok(Enforced::Part),
        Ok(RulesetStatus::NotEnforced) => Ok(Enforced::Nothing),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// What [`open_nothing_more`] takes away with a kernel's version of Landlock, for a person to read.
pub fn reach(abi: i64) -> &'static str {
    match abi {
        6.. => "files, TCP, device ioctls, abstract sockets and signals",
        5 => "files, TCP, device ioctls; not abstract sockets and signals",
        4 => "files and TCP; not device ioctls, abstract sockets and signals",
        _ => "files; not TCP, device ioctls, abstract sockets and signals",
    }
}
