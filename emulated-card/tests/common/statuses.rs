//! The status words that each command of each applet can end with.
//!
//! [`STATUSES`] is complete in both directions: the scenarios end each command with each of these, and no sequence of
//! commands that the fuzzer or a property test finds ends one with any other.

use std::collections::BTreeSet;

use emulated_card::card::Profile;
use vscard_protocol::apdu::{aid, ins};
use vscard_protocol::{Command, StatusWord};

/// Who answers, which command, and how it can end.
///
/// `card` is what is the same whichever applet is selected. `CAC` is what is the same in all applets of a CAC, and on a
/// CAC where none is selected (`none`). `container` is the capability container and the PKI containers, `discovery`
/// GlobalPlatform and plug-and-play, `writable` what a PIV card with a card management key has of its own.
pub(crate) const STATUSES: &[(&str, &str, &str)] = &[
    ("card", "refused class", "6881 6882 6E00"),
    ("card", "refused chaining", "6884"),
    ("card", "SELECT", "9000 61XX 6A82 6A86"),
    ("card", "GET RESPONSE", "9000 61XX 6700 6985 6A86"),
    ("card", "GET CHALLENGE", "9000 61XX 6700 6A86"),
    ("PIV", "other SELECT", "6A82 6A86"),
    ("PIV", "GET DATA", "9000 61XX 6982 6A80 6A82 6A86"),
    ("PIV", "VERIFY", "9000 63CX 6581 6983 6A80 6A86 6A88 6F00"),
    ("PIV", "CHANGE REFERENCE DATA", "9000 63CX 6581 6983 6985 6A80 6A86 6A88 6F00"),
    ("PIV", "RESET RETRY COUNTER", "9000 63CX 6581 6983 6985 6A80 6A86 6A88"),
    ("PIV", "GENERAL AUTHENTICATE", "9000 61XX 6700 6982 6A80 6A86 6A88 6F00"),
    ("PIV", "other command", "6D00"),
    ("writable", "card management key", "9000 61XX 6700 6982 6985 6A80 6A86 6A88"),
    ("writable", "PUT DATA", "9000 6700 6982 6A80 6A81 6A86"),
    ("writable", "GENERATE ASYMMETRIC KEY PAIR", "9000 61XX 6982 6A80 6A86"),
    ("CAC", "VERIFY", "9000 63CX 6581 6700 6983 6A80 6A86 6F00"),
    ("CAC", "CHANGE REFERENCE DATA", "9000 63CX 6581 6700 6983 6985 6A80 6A86 6F00"),
    ("CAC", "RESET RETRY COUNTER", "9000 63CX 6581 6700 6983 6985 6A80 6A86"),
    ("CAC", "other SELECT", "6A81"),
    ("none", "SELECT of an object", "6A82"),
    ("none", "other command", "6D00"),
    ("container", "SELECT of an object", "9000 6700 6A82"),
    ("container", "GET PROPERTIES", "9000 61XX 6700 6A86 6A88 6CXX"),
    ("container", "READ BUFFER", "9000 61XX 6700 6A80 6A86"),
    ("container", "UPDATE BUFFER", "6985"),
    ("container", "SIGN/DECRYPT", "9000 61XX 6700 6982 6A80 6A86 6D00 6F00"),
    ("container", "other command", "6D00"),
    ("access control", "SELECT of an object", "6A82"),
    ("access control", "GET PROPERTIES", "9000 61XX 6700 6A86 6A88 6CXX"),
    ("access control", "GET ACR", "9000 61XX 6700 6A86 6A88"),
    ("access control", "other command", "6D00"),
    ("discovery", "SELECT of an object", "6A82"),
    ("discovery", "GET DATA", "9000 61XX 6700 6A88"),
    ("discovery", "other command", "6D00"),
];

/// Who answered, which command, and how it ended.
pub(crate) type Seen = (&'static str, &'static str, String);

/// All of [`STATUSES`].
pub(crate) fn all() -> BTreeSet<Seen> {
    STATUSES
        .iter()
        .flat_map(|&(who, what, how)| how.split(' ').map(move |status| (who, what, status.to_owned())))
        .collect()
}

/// Whether a command can end like that.
#[allow(dead_code, reason = "scenarios compare all at once")]
pub(crate) fn is_known((who, what, status): &Seen) -> bool {
    STATUSES.iter().any(|(a, b, all)| (a, b) == (who, what) && all.split(' ').any(|one| one == status))
}

/// Knows from commands and responses which applet is selected.
pub(crate) struct Observer {
    profile: Profile,
    selected: &'static str,
    /// Whether the card has an administrator.
    writable: bool,
}

impl Observer {
    pub(crate) fn new(profile: Profile) -> Self {
        let mut observer = Self { profile, selected: "", writable: false };
        observer.reset();
        observer
    }

    /// Of a PIV card that can be written to, or of one that was.
    pub(crate) fn of_writable(administrator: bool) -> Self {
        Self { writable: administrator, ..Self::new(Profile::Piv) }
    }

    pub(crate) fn reset(&mut self) {
        self.selected = if self.profile == Profile::Cac { "none" } else { "PIV" };
    }

    pub(crate) fn is_piv(&self) -> bool {
        self.selected == "PIV"
    }

    /// A command was answered.
    pub(crate) fn see(&mut self, command: &Command, status: StatusWord) -> Seen {
        let (who, what) = self.place(command);
        if (who, what) == ("card", "SELECT") && matches!(status.sw1(), 0x90 | 0x61) {
            self.selected = applet(command.data());
        }
        let [sw1, sw2] = status.0.to_be_bytes();
        let status = match (sw1, sw2) {
            (0x61 | 0x6C, _) => format!("{sw1:02X}XX"),
            (0x63, 0xC0..=0xCF) => "63CX".into(),
            _ => format!("{:04X}", status.0),
        };
        (who, what, status)
    }

    fn place(&self, command: &Command) -> (&'static str, &'static str) {
        let selected = self.selected;
        let cac = !self.is_piv();
        match (command.cla(), command.ins(), selected) {
            (0x00 | 0x80, ..) | (0x10, ins::GENERAL_AUTHENTICATE, "PIV") => {}
            (0x10, ins::PUT_DATA, "PIV") if self.writable => {}
            (0x10, ..) => return ("card", "refused chaining"),
            _ => return ("card", "refused class"),
        }
        match command.ins() {
            ins::SELECT if command.p1() == 0x04 => ("card", "SELECT"),
            ins::GET_RESPONSE => ("card", "GET RESPONSE"),
            ins::GET_CHALLENGE => ("card", "GET CHALLENGE"),
            ins::SELECT if cac && command.p1() == 0x02 => (selected, "SELECT of an object"),
            ins::SELECT => (if cac { "CAC" } else { "PIV" }, "other SELECT"),
            ins::VERIFY => (if cac { "CAC" } else { "PIV" }, "VERIFY"),
            ins::CHANGE_REFERENCE_DATA => (if cac { "CAC" } else { "PIV" }, "CHANGE REFERENCE DATA"),
            ins::RESET_RETRY_COUNTER => (if cac { "CAC" } else { "PIV" }, "RESET RETRY COUNTER"),
            ins => match (selected, ins) {
                ("PIV", ins::GET_DATA_ODD) | ("discovery", ins::GET_DATA) => (selected, "GET DATA"),
                ("PIV", ins::GENERAL_AUTHENTICATE) if self.writable && command.p2() == 0x9B => {
                    ("writable", "card management key")
                }
                ("PIV", ins::PUT_DATA) if self.writable => ("writable", "PUT DATA"),
                ("PIV", ins::GENERATE_KEY_PAIR) if self.writable => {
                    ("writable", "GENERATE ASYMMETRIC KEY PAIR")
                }
                ("PIV", ins::GENERAL_AUTHENTICATE) => (selected, "GENERAL AUTHENTICATE"),
                ("container" | "access control", ins::GET_PROPERTIES) => (selected, "GET PROPERTIES"),
                ("container", ins::READ_BUFFER) => (selected, "READ BUFFER"),
                ("container", ins::UPDATE_BUFFER) => (selected, "UPDATE BUFFER"),
                ("container", ins::SIGN_DECRYPT) => (selected, "SIGN/DECRYPT"),
                ("access control", ins::GET_ACR) => (selected, "GET ACR"),
                _ => (selected, "other command"),
            },
        }
    }
}

/// The applet with that identifier, which may be truncated (PIV).
fn applet(identifier: &[u8]) -> &'static str {
    match identifier.get(..5) {
        Some(rid) if rid == &aid::PIV[..5] => "PIV",
        Some(_) if identifier == aid::CAC_ACA => "access control",
        Some(rid) if rid == aid::RID_CAC || rid == aid::RID_GSC_IS => "container",
        _ => "discovery",
    }
}
