//! The raw RSA operation, also of tokens that have only padded ones.

use vscard_protocol::Secret;
use zeroize::Zeroizing;

use super::super::KeyError;
use super::ffi::{Mechanism, PrivateKey};
use super::login::{failed, of_length};

/// `block` to the private exponent. It is as long as the modulus, and below it.
pub(super) fn raw(key: &PrivateKey, block: &[u8]) -> Result<Secret, KeyError> {
    let mut result = Zeroizing::new(vec![0; block.len()]);
    let signed = signed_data(block);
    // A key may be allowed to sign and not to decrypt, or the other way round. To sign a ready block is the same
    // operation. What is refused for that is refused before a key that wants the PIN each time has used it up.
    let raw = match signed {
        Some(_) => key
            .sign(Mechanism::RsaRaw, block, &mut result)
            .or_else(|first| key.rsa_decrypt_raw(block, &mut result).map_err(|_| first)),
        None => key
            .rsa_decrypt_raw(block, &mut result)
            .or_else(|first| key.sign(Mechanism::RsaRaw, block, &mut result).map_err(|_| first)),
    };
    let padded = |first| match signed {
        Some(data) => key.sign(Mechanism::RsaPkcs, data, &mut result).map_err(|_| first),
        None => decrypt_and_pad(key, block, &mut result).ok_or(first),
    };
    let written = raw.or_else(padded).map_err(failed)?;
    of_length(written, block.len())?;
    Ok(Secret::new(std::mem::take(&mut *result)))
}

/// What is signed by a block that is padded for a signature (RFC 8017 §9.2): 00 01, eight or more FF, 00, data.
fn signed_data(block: &[u8]) -> Option<&[u8]> {
    let padded = block.strip_prefix(&[0x00, 0x01])?;
    let ones = padded.iter().take_while(|&&byte| byte == 0xff).count();
    let (&separator, data) = padded.get(ones..)?.split_first()?;
    (ones >= 8 && separator == 0x00).then_some(data)
}

/// Decryption by a token that takes the padding off. What it was does not matter to anybody, so other padding is put
/// on.
fn decrypt_and_pad(key: &PrivateKey, block: &[u8], out: &mut [u8]) -> Option<usize> {
    let written = key.rsa_decrypt_pkcs1(block, out).ok()?;
    pad(out, written)?;
    Some(out.len())
}

/// Moves the message that `block` begins with to its end, padded for encryption (RFC 8017 §7.2.1): 00 02, eight or
/// more random bytes that are not zero, 00, message.
fn pad(block: &mut [u8], message: usize) -> Option<()> {
    let start = block.len().checked_sub(message).filter(|&start| start >= 11)?;
    block.copy_within(..message, start);
    let (padding, _) = block.split_at_mut(start);
    getrandom::fill(padding).ok()?;
    for byte in padding.iter_mut() {
        while *byte == 0 {
            getrandom::fill(std::slice::from_mut(byte)).ok()?;
        }
    }
    if let [zero, kind, .., separator] = padding {
        (*zero, *kind, *separator) = (0x00, 0x02, 0x00);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_for_signatures_is_known() {
        let block = |ones: usize, end: &[u8]| [&[0, 1], &vec![0xff; ones][..], end].concat();
        assert_eq!(signed_data(&block(8, b"\0data")), Some(&b"data"[..]));
        assert_eq!(signed_data(&block(100, b"\0")), Some(&b""[..]));
        assert_eq!(signed_data(&block(8, b"\0\0\xff")), Some(&b"\0\xff"[..]));
        for other in
            [block(7, b"\0data"), block(8, b"\x01data"), block(8, b""), vec![0, 2, 3], vec![], vec![0; 64]]
        {
            assert_eq!(signed_data(&other), None, "{other:02x?}");
        }
    }

    #[test]
    fn padding_for_encryption_is_put_before_the_message() {
        for length in [0, 1, 20, 53] {
            let mut block = vec![0; 64];
            block[..length].fill(7);
            pad(&mut block, length).unwrap();
            let (padding, message) = block.split_at(64 - length);
            assert!(message.iter().all(|&byte| byte == 7));
            assert!(padding.starts_with(&[0, 2]) && padding.ends_with(&[0]));
            assert!(!padding[2..padding.len() - 1].contains(&0));
        }
        assert_eq!(pad(&mut [7; 64], 54), None);
        assert_eq!(pad(&mut [7; 64], 65), None);
    }
}
