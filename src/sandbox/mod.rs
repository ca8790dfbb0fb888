//! What keeps a guest that has taken over alcove from taking over anything else.
//!
//! Each file is one barrier and knows nothing of the others, nor of the rest of alcove: [`seccomp`]
//! which system calls a thread may make, [`landlock`] which files a process may open, [`process`]
//! what a process holds (privileges, descriptors, limits), [`jail`] what it sees (namespaces, an
//! empty root, control groups), [`janitor`] the one thing that is left to be done outside.
//! docs/security.md tells what each is for.

pub mod attempt;
pub mod cgroup;
pub mod jail;
pub mod janitor;
pub mod landlock;
pub mod process;
pub mod seccomp;
