//! The reader as a guest and an embedder meet it.
#![allow(clippy::unwrap_used, reason = "tests")]
#![forbid(unsafe_code)]

mod abort;
mod chaining;
mod guest;
mod hostile;
mod messages;
mod snapshot;
mod time;
mod usb;
