//! The access control applet: which rule guards which command of which applet.
//!
//! Nothing here decides anything; middleware reads it to learn what the other applets do. Structure: GSC-IS 2.1
//! §5.3.3.5, tables 5-15 to 5-21. The compact forms (P1 = 40 and up) are in no document and follow what real
//! cards send.

use vscard_protocol::apdu::{aid, ins};
use vscard_protocol::{Command, StatusWord};

use super::container::{Form, get_properties, long_properties};
use super::{MAX_CERTIFICATES, TAG_APPLET_INFORMATION, pki_aid, pki_id};
use crate::applet::{Applet, Outcome, Session, fci};
use crate::keys::writable::Writable;
use crate::tlv::simple;

/// Applet family and version, in front of every table.
const ACA_INFORMATION: [u8; 5] = [0x10, 0x02, 0x06, 0x02, 0x02];

/// One access control rule (table 5-15).
struct Rule {
    id: u8,
    /// GSC-IS 2.1 table 3-2: 00 always, 01 never, 02 external authentication, 03 that or PIN,
    /// 04 GlobalPlatform secure channel, 06 PIN.
    kind: u8,
    /// Third byte of the compact form.
    provider: u8,
    /// Access method provider and key reference.
    methods: &'static [(u8, u8)],
}

/// Rules that always hold, or never.
const ALWAYS: u8 = 0x00;
const NEVER: u8 = 0x01;
/// The rule of private keys.
const PIN: u8 = 0x06;
/// The rules of VERIFY and GET CHALLENGE: always.
const VERIFY: u8 = 0x10;
const AUTHENTICATE: u8 = 0x11;

/// The rules every CAC lists, whether or not an applet refers to them.
const RULES: [Rule; 11] = [
    Rule { id: ALWAYS, kind: 0x00, provider: 0x00, methods: &[] },
    Rule { id: NEVER, kind: 0x01, provider: 0x00, methods: &[] },
    Rule { id: 0x02, kind: 0x00, provider: 0x1F, methods: &[] },
    Rule { id: PIN, kind: 0x06, provider: 0x00, methods: &[(0x1E, 0x00)] },
    Rule { id: 0x04, kind: 0x04, provider: 0x1F, methods: &[(0x1F, 0x21)] },
    Rule { id: 0x08, kind: 0x03, provider: 0x00, methods: &[(0x1D, 0x01), (0x1E, 0x01)] },
    Rule { id: 0x09, kind: 0x02, provider: 0x00, methods: &[(0x1D, 0x02)] },
    Rule { id: 0x0A, kind: 0x03, provider: 0x00, methods: &[(0x1D, 0x03), (0x1E, 0x01)] },
    Rule { id: 0x0B, kind: 0x02, provider: 0x00, methods: &[(0x1D, 0x04)] },
    Rule { id: VERIFY, kind: 0x00, provider: 0x1E, methods: &[] },
    Rule { id: AUTHENTICATE, kind: 0x00, provider: 0x1D, methods: &[] },
];

/// Access method providers, all of them this applet: identifier, and two bytes of the compact form (table 5-20).
const PROVIDERS: [(u8, [u8; 2]); 3] = [(0x1F, [0x12, 0x00]), (0x1E, [0x10, 0x01]), (0x1D, [0x01, 0x00])];

/// An applet, and the rule for each command on each of its objects (table 5-16).
struct Guarded {
    id: u8,
    aid: [u8; 7],
    objects: Vec<Object>,
}

/// An object: its identifier, and the rule for each instruction.
struct Object {
    id: [u8; 2],
    rules: &'static [(u8, u8)],
}

impl Object {
    /// Identifier, then per command: instruction, configuration (00: whatever P1, P2 and data), rule.
    fn encode(&self) -> Vec<u8> {
        let mut value = self.id.to_vec();
        value.extend(self.rules.iter().flat_map(|(instruction, rule)| [*instruction, 0x00, *rule]));
        value
    }
}

/// Stands for the applet itself, not one of its objects.
const APPLET_ITSELF: [u8; 2] = [0xFF, 0xFF];

/// The applet. Everything it can answer is known when the card is made.
pub(super) struct AccessControl {
    applets: Vec<Guarded>,
}

impl AccessControl {
    /// For a card with that many PKI containers.
    pub(super) fn new(certificates: u8) -> Self {
        const { assert!(MAX_CERTIFICATES <= 0x0F) };
        let object = |id, rules| Object { id, rules };
        let general = || object(APPLET_ITSELF, &[(ins::GET_CHALLENGE, AUTHENTICATE), (ins::VERIFY, VERIFY)]);
        let ccc = object([0xDB, 0x00], &[(ins::UPDATE_BUFFER, NEVER), (ins::READ_BUFFER, ALWAYS)]);
        let mut applets = vec![
            Guarded {
                id: 0x1F,
                aid: aid::CAC_ACA,
                objects: vec![object(APPLET_ITSELF, &[(ins::VERIFY, ALWAYS)])],
            },
            Guarded { id: 0x4F, aid: aid::CAC_CCC, objects: vec![ccc, general()] },
        ];
        applets.extend((0..certificates).map(|index| {
            let rules = &[(ins::UPDATE_BUFFER, NEVER), (ins::READ_BUFFER, ALWAYS), (ins::SIGN_DECRYPT, PIN)];
            let objects = vec![object(pki_id(index), rules), general()];
            Guarded { id: 0x61 + index, aid: pki_aid(index), objects }
        }));
        Self { applets }
    }

    /// GET ACR (§5.3.3.5).
    fn get_acr(&self, command: &Command) -> Outcome {
        let body = command.data();
        if command.p2() != 0 {
            return StatusWord::INCORRECT_P1P2.into();
        }
        let wanted = match command.p1() {
            0x01 => 1,
            0x11 => 7,
            0x12 => 2,
            0x00 | 0x10 | 0x20 | 0x21 | 0x40 | 0x41 | 0x50..=0x52 | 0x60 | 0x61 => 0,
            _ => return StatusWord::INCORRECT_P1P2.into(),
        };
        if body.len() != wanted {
            return StatusWord::WRONG_LENGTH.into();
        }
        let table = match command.p1() {
            0x00 => Some(counted(0xA1, RULES.iter().map(rule))),
            0x01 => RULES.iter().find(|own| body == [own.id]).map(rule),
            0x10 => Some(counted(0x81, self.applets.iter().map(guarded))),
            0x11 => self.applets.iter().find(|own| body == own.aid).map(guarded),
            0x12 => self
                .applets
                .iter()
                .flat_map(|applet| &applet.objects)
                .find(|object| body == object.id && object.id != APPLET_ITSELF)
                .map(|object| simple_of(0x82, &object.encode())),
            0x20 => Some(counted(0x91, PROVIDERS.iter().map(|(id, _)| named(0x90, *id, aid::CAC_ACA)))),
            0x21 => Some(counted(0x94, self.services().map(|own| named(0x93, own.id, own.aid)))),
            // The compact forms have no applet information in front.
            0x40 | 0x41 => return RULES.iter().flat_map(compact_rule).collect::<Vec<_>>().into(),
            0x50..=0x52 => {
                return self.applets.iter().flat_map(compact_guarded).collect::<Vec<_>>().into();
            }
            0x60 => {
                let provider = |(id, [x, y]): &(u8, [u8; 2])| {
                    [&[*id, 0x00, 0x07], &aid::CAC_ACA[..], &[*x, *y, 0x00, 0x00]].concat()
                };
                return PROVIDERS.iter().flat_map(provider).collect::<Vec<_>>().into();
            }
            _ => {
                let service = |own: &Guarded| [&[own.id, 0x00, 0x07], &own.aid[..]].concat();
                return self.services().flat_map(service).collect::<Vec<_>>().into();
            }
        };
        match table {
            Some(table) => [simple(TAG_APPLET_INFORMATION, ACA_INFORMATION), table].concat().into(),
            None => StatusWord::REFERENCE_NOT_FOUND.into(),
        }
    }

    /// The applets that serve data: all but this one (table 5-21).
    fn services(&self) -> impl Iterator<Item = &Guarded> {
        self.applets.iter().filter(|applet| applet.aid != aid::CAC_ACA)
    }
}

impl Applet for AccessControl {
    fn answers_to(&self, aid: &[u8]) -> bool {
        aid::CAC_ACA == aid
    }

    fn fci(&self, _: Option<&dyn Writable>) -> Vec<u8> {
        fci(&aid::CAC_ACA, &[])
    }

    fn command(&self, command: &Command, _: Session<'_>) -> Outcome {
        match command.ins() {
            ins::GET_ACR => self.get_acr(command),
            ins::GET_PROPERTIES => get_properties(command, |form| {
                let mut all = vec![(TAG_APPLET_INFORMATION, simple(TAG_APPLET_INFORMATION, ACA_INFORMATION))];
                if form == Form::Long {
                    all.extend(long_properties());
                }
                all
            }),
            // It has no objects.
            ins::SELECT => StatusWord::NOT_FOUND.into(),
            _ => StatusWord::INS_NOT_SUPPORTED.into(),
        }
    }
}

/// SIMPLE-TLV with a short value. The longest here is a PKI applet's entry, 29 bytes.
fn simple_of(tag: u8, value: &[u8]) -> Vec<u8> {
    [&[tag, value.len() as u8], value].concat()
}

/// A table: how many entries, then the entries.
fn counted(tag: u8, entries: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let entries: Vec<_> = entries.collect();
    [simple(tag, [entries.len() as u8]), entries.concat()].concat()
}

fn rule(rule: &Rule) -> Vec<u8> {
    let mut value = vec![rule.id, rule.kind, rule.methods.len() as u8];
    value.extend(rule.methods.iter().flat_map(|(provider, key)| [*provider, *key]));
    simple_of(0xA0, &value)
}

fn compact_rule(rule: &Rule) -> Vec<u8> {
    let mut value = vec![rule.id, rule.kind, rule.provider];
    match rule.methods {
        [] => value.extend([0x00, 0x00]),
        // The high bit says that another method follows.
        [first @ .., (provider, key)] => {
            value.extend(first.iter().flat_map(|(provider, key)| [provider | 0x80, *key]));
            value.extend([*provider, *key]);
        }
    }
    value.push(0x00);
    [&[value.len() as u8], value.as_slice()].concat()
}

fn guarded(applet: &Guarded) -> Vec<u8> {
    let mut value = vec![applet.id, applet.objects.len() as u8];
    value.extend(applet.objects.iter().flat_map(|object| simple_of(0x82, &object.encode())));
    simple_of(0x80, &value)
}

fn compact_guarded(applet: &Guarded) -> Vec<u8> {
    let mut value = vec![applet.id, applet.objects.len() as u8];
    for object in &applet.objects {
        let object = object.encode();
        value.push(object.len() as u8);
        value.extend(object);
    }
    [&[value.len() as u8], value.as_slice()].concat()
}

/// An identifier with the application identifier it stands for.
fn named(tag: u8, id: u8, aid: [u8; 7]) -> Vec<u8> {
    simple_of(tag, &[vec![id], simple(0x92, aid)].concat())
}
