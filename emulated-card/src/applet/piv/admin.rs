//! Authentication by the card management key, 9B (SP 800-73-4 Part 2 §3.2.4, appendix A.1): who knows it may write.

use vscard_protocol::apdu::ins;
use vscard_protocol::{Command, Secret, StatusWord};

use super::authenticate::{CARD_MANAGEMENT, Template, response};
use crate::applet::Outcome;
use crate::card::Random;
use crate::keys::writable::ManagementAlgorithm;
use crate::tlv::ber;

/// How far the authentication of the card's administrator is.
#[derive(Default)]
pub(crate) enum Administrator {
    /// Nobody has shown to be it.
    #[default]
    Unknown,
    /// The command before this one began an authentication, which only the next one may end.
    Begun(Attempt),
    /// It is there, until the card is reset or another application selected.
    Authenticated,
}

/// An authentication that was begun. It is taken by whatever command comes next, and goes on only where that fetches
/// the rest of an answer or is a piece of the host's.
pub(crate) struct Attempt {
    kind: Kind,
    algorithm: ManagementAlgorithm,
    /// What only the holder of the key can answer.
    expected: Secret,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The card gave a challenge, and wants it encrypted.
    External,
    /// The card gave an encrypted witness, and wants it decrypted.
    Mutual,
}

impl Administrator {
    /// Ends an attempt that was begun, if there is one, and gives it away.
    pub(crate) fn take_attempt(&mut self) -> Option<Attempt> {
        match std::mem::take(self) {
            Self::Begun(attempt) => Some(attempt),
            other => {
                *self = other;
                None
            }
        }
    }

    /// Goes on with an attempt that was taken, if there is one.
    pub(crate) fn resume(&mut self, attempt: Option<Attempt>) {
        if let Some(attempt) = attempt {
            *self = Self::Begun(attempt);
        }
    }

    pub(crate) fn is_authenticated(&self) -> bool {
        matches!(self, Self::Authenticated)
    }
}

impl Attempt {
    /// Whether a command is what ends it, or a piece of that.
    pub(crate) fn is_answered_by(&self, command: &Command) -> bool {
        command.ins() == ins::GENERAL_AUTHENTICATE
            && command.p2() == CARD_MANAGEMENT
            && ManagementAlgorithm::of_identifier(command.p1()) == Some(self.algorithm)
    }
}

/// GENERAL AUTHENTICATE with the key of a card that has one. `attempt` is what the command before began,
/// `encrypted` makes of a block what the key does.
pub(super) fn authenticate(
    algorithm: ManagementAlgorithm,
    template: &Template<'_>,
    attempt: Option<Attempt>,
    encrypted: impl Fn(&[u8]) -> Result<Secret, StatusWord>,
    administrator: &mut Administrator,
    random: &mut Random,
) -> Outcome {
    let mut block = vec![0; algorithm.block_len()];
    let (kind, answer, challenge) = match *template {
        // 7C {81 00}: a challenge, please; 7C {80 00}: a witness.
        Template { witness: None, challenge: Some([]), response: None, exponentiation: None } => {
            random(&mut block);
            return match encrypted(&block) {
                Ok(expected) => {
                    *administrator =
                        Administrator::Begun(Attempt { kind: Kind::External, algorithm, expected });
                    ber(&[0x7C], &ber(&[0x81], &block)).into()
                }
                Err(status) => status.into(),
            };
        }
        Template { witness: Some([]), challenge: None, response: None, exponentiation: None } => {
            random(&mut block);
            return match encrypted(&block) {
                Ok(witness) => {
                    let expected = Secret::new(block);
                    *administrator =
                        Administrator::Begun(Attempt { kind: Kind::Mutual, algorithm, expected });
                    ber(&[0x7C], &ber(&[0x80], witness.expose())).into()
                }
                Err(status) => status.into(),
            };
        }
        // 7C {82 encrypted challenge}; 7C {80 decrypted witness, 81 host's challenge, perhaps 82 00}.
        Template { witness: None, challenge: None, response: Some(answer), exponentiation: None } => {
            (Kind::External, answer, None)
        }
        Template {
            witness: Some(answer),
            challenge: Some(challenge),
            response: None | Some([]),
            exponentiation: None,
        } if challenge.len() == block.len() => (Kind::Mutual, answer, Some(challenge)),
        _ => return StatusWord::INCORRECT_DATA.into(),
    };
    *administrator = Administrator::Unknown;
    let Some(attempt) = attempt.filter(|one| (one.kind, one.algorithm) == (kind, algorithm)) else {
        return StatusWord::CONDITIONS_NOT_SATISFIED.into();
    };
    if !attempt.expected.equals(answer) {
        return StatusWord::SECURITY_STATUS_NOT_SATISFIED.into();
    }
    // Nothing of the host's is encrypted before the host has shown that it has the key itself.
    let outcome = match challenge.map(encrypted) {
        None => StatusWord::SUCCESS.into(),
        Some(Ok(answer)) => Outcome::Data(response(answer)),
        Some(Err(status)) => return status.into(),
    };
    *administrator = Administrator::Authenticated;
    outcome
}
