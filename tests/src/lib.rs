//! The stack against real peers: what boots QEMU and a Debian guest, and what talks to them.
//!
//! [`guest`] is a machine with a real kernel, `pcscd`, `libccid` and OpenSC in it; a scenario starts one with
//! the USB devices it is about and runs commands inside.

#![forbid(unsafe_code)]

pub mod database;
pub mod guest;
pub mod passthru;
pub mod process;
