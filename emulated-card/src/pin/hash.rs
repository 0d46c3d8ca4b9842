//! A PIN or PUK as it is kept.

use std::fmt;
use std::sync::LazyLock;

use argon2::password_hash::{Output, ParamsString, PasswordHash, SaltString};
use argon2::{ARGON2ID_IDENT, Algorithm, Argon2, Block, Params, Version};
use vscard_protocol::Secret;
use zeroize::{Zeroize, Zeroizing};

use super::turns::Turns;

/// Bytes, more than 32 MiB.
const MAPPED: usize = 33 * 1024 * 1024;

/// A hash takes 19 MiB and a processor. A thousand cards in one process, verified at once, are not to take 19 GiB, and
/// more at a time than there are processors would make none faster.
static TURNS: LazyLock<Turns> = LazyLock::new(|| {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Turns::new(processors.max(2) as u64)
});

/// How much a guess is to take.
#[derive(Clone, Copy)]
pub(super) enum Cost {
    /// As much as a PIN of eight digits needs where the hash may be stolen.
    Disk,
    /// Nothing: whoever reads this process's memory has the PIN anyway.
    Memory,
}

/// A PIN or PUK as it is kept: argon2id, in the PHC string format.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PinHash {
    params: Params,
    salt: SaltString,
    hash: Output,
}

impl PinHash {
    pub(super) fn of(pin: &Secret, cost: Cost) -> Result<Self, String> {
        let params = match cost {
            Cost::Disk => Params::default(),
            Cost::Memory => Params::new(Params::MIN_M_COST, Params::MIN_T_COST, Params::MIN_P_COST, None)
                .map_err(|error| error.to_string())?,
        };
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| error.to_string())?;
        let salt = SaltString::encode_b64(&random).map_err(|error| error.to_string())?;
        let hash = derive(&params, &salt, pin, Params::DEFAULT_OUTPUT_LEN)?;
        let hash = Output::new(hash.expose()).map_err(|error| error.to_string())?;
        Ok(Self { params, salt, hash })
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let parsed = PasswordHash::new(text).ok()?;
        let params = Params::try_from(&parsed).ok()?;
        // A later version may choose more; a file is not to make this process take any amount of memory or time.
        let bearable = params.m_cost() <= 256 * 1024 && params.t_cost() <= 64 && params.p_cost() <= 16;
        if parsed.algorithm != ARGON2ID_IDENT || parsed.version != Some(Version::V0x13.into()) || !bearable {
            return None;
        }
        let salt = SaltString::from_b64(parsed.salt?.as_str()).ok()?;
        Some(Self { params, salt, hash: parsed.hash? })
    }

    pub(super) fn matches(&self, pin: &Secret) -> Result<bool, String> {
        Ok(derive(&self.params, &self.salt, pin, self.hash.len())?.equals(self.hash.as_bytes()))
    }
}

impl fmt::Display for PinHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        PasswordHash {
            algorithm: ARGON2ID_IDENT,
            version: Some(Version::V0x13.into()),
            params: ParamsString::try_from(&self.params).map_err(|_| fmt::Error)?,
            salt: Some(self.salt.as_salt()),
            hash: Some(self.hash),
        }
        .fmt(f)
    }
}

impl fmt::Debug for PinHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Eight digits behind it are soon found, so the hash is a secret, too.
        f.write_str("PinHash")
    }
}

fn derive(params: &Params, salt: &SaltString, pin: &Secret, length: usize) -> Result<Secret, String> {
    let mut buffer = [0; 64];
    let salt = salt.decode_b64(&mut buffer).map_err(|error| error.to_string())?;
    let _turn = TURNS.take();
    // The crate's own buffer would not be wiped. It is asked for in a size that glibc always maps and unmaps (more than
    // its DEFAULT_MMAP_THRESHOLD_MAX): with a smaller one, the second VERIFY's memory would stay with the process.
    // What is not used of it is never resident.
    let mut memory = Vec::with_capacity(params.block_count().max(MAPPED / size_of::<Block>()));
    memory.resize(params.block_count(), Block::default());
    let mut output = Zeroizing::new(vec![0; length]);
    let hashed = Argon2::new(Algorithm::Argon2id, Version::V0x13, params.clone())
        .hash_password_into_with_memory(pin.expose(), salt, &mut output, memory.as_mut_slice());
    // Not the vector, which would touch all of it.
    memory.iter_mut().for_each(Zeroize::zeroize);
    hashed.map_err(|error| error.to_string())?;
    Ok(Secret::new(std::mem::take(&mut *output)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_salted_and_survives_text() {
        let pin = Secret::from(&b"1234"[..]);
        let hash = PinHash::of(&pin, Cost::Disk).unwrap();
        let text = hash.to_string();
        assert!(text.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{text}");
        assert_ne!(text, PinHash::of(&pin, Cost::Disk).unwrap().to_string());
        let parsed = PinHash::parse(&text).unwrap();
        assert_eq!(parsed.to_string(), text);
        assert!(parsed.matches(&pin).unwrap());
        assert!(!parsed.matches(&Secret::from(&b"1235"[..])).unwrap());
        assert!(!parsed.matches(&Secret::default()).unwrap());
        assert_eq!(format!("{hash:?}"), "PinHash");
    }

    /// From the tests of the reference implementation.
    #[test]
    fn hashes_of_others_are_understood() {
        let text = "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4";
        let hash = PinHash::parse(text).unwrap();
        assert!(hash.matches(&Secret::from(&b"password"[..])).unwrap());
    }

    #[test]
    fn hashes_that_would_take_too_much_are_not() {
        let good = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA";
        assert!(PinHash::parse(good).is_some());
        for (part, worse) in [
            ("m=19456", "m=4194304"),
            ("t=2", "t=1000000"),
            ("p=1", "p=1000"),
            ("argon2id", "argon2d"),
            ("v=19", "v=16"),
            ("$aGFzaGhhc2hoYXNoaGFzaA", ""),
        ] {
            assert!(PinHash::parse(&good.replace(part, worse)).is_none(), "{worse}");
        }
    }
}
