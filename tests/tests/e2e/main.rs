//! End to end: the stack in a real guest, one scenario after the other.

mod apdu;
mod capture;
mod card;
mod cards;
mod connection;
mod console;
mod guest;
mod hardware;
mod host;
mod hostile;
mod lifecycle;
mod piv;
mod raw;
mod reader;
mod remote;
mod slots;
mod slow;
mod snapshots;
mod state;
mod takeover;
mod writable;
