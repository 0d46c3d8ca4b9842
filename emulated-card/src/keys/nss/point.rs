//! Points on NIST curves: a peer's public key, looked at before a private key meets it.
//!
//! SP 800-56A Rev. 3 §5.6.2.3.4 has a received point checked. softoken does so itself; of a token that does not,
//! points on other curves would draw the private key.

use super::super::Curve;

/// The 32-bit digits of a number below 2³⁸⁴, the lowest first.
type Number = [u32; 12];

/// SP 800-186 §3.2.1.3 and §3.2.1.4: the field's prime and the coefficient b. The coefficient a is -3.
const P256: (&str, &str) = (
    "ffffffff00000001000000000000000000000000ffffffffffffffffffffffff",
    "5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b",
);
const P384: (&str, &str) = (
    "fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffeffffffff0000000000000000ffffffff",
    "b3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aef",
);

/// Whether it is an uncompressed point (04, x, y) of `curve`.
pub(super) fn is_on(curve: Curve, point: &[u8]) -> bool {
    let (prime, b) = match curve {
        Curve::P256 => P256,
        Curve::P384 => P384,
    };
    let Some((0x04, coordinates)) = point.split_first() else { return false };
    if coordinates.len() != 2 * curve.field_len() {
        return false;
    }
    let (x, y) = coordinates.split_at(curve.field_len());
    let field = Field { prime: digits(prime) };
    let (x, y, b) = (number(x), number(y), digits(b));
    if !less(&x, &field.prime) || !less(&y, &field.prime) {
        return false;
    }
    // y² = x³ - 3x + b, as y² + 3x = x·x² + b.
    let left = field.add(&field.multiply(&y, &y), &field.add(&x, &field.add(&x, &x)));
    let right = field.add(&field.multiply(&x, &field.multiply(&x, &x)), &b);
    left == right
}

/// A big-endian number of at most 48 bytes.
fn number(bytes: &[u8]) -> Number {
    let mut number = Number::default();
    for (digit, bytes) in number.iter_mut().zip(bytes.rchunks(4)) {
        *digit = bytes.iter().fold(0, |digit, &byte| digit << 8 | u32::from(byte));
    }
    number
}

fn digits(hexadecimal: &str) -> Number {
    let mut number = Number::default();
    for (place, digit) in
        hexadecimal.bytes().rev().filter_map(|digit| char::from(digit).to_digit(16)).enumerate()
    {
        if let Some(word) = number.get_mut(place / 8) {
            *word |= digit << (4 * (place % 8));
        }
    }
    number
}

fn less(a: &Number, b: &Number) -> bool {
    a.iter().rev().lt(b.iter().rev())
}

/// Numbers modulo a prime. All that is computed with is public, so that it may take a time that tells it.
struct Field {
    prime: Number,
}

impl Field {
    fn add(&self, a: &Number, b: &Number) -> Number {
        let mut sum = Number::default();
        let mut carry = 0;
        for (digit, (&a, &b)) in sum.iter_mut().zip(a.iter().zip(b)) {
            let wide = u64::from(a) + u64::from(b) + carry;
            *digit = wide as u32;
            carry = wide >> 32;
        }
        if carry == 0 && less(&sum, &self.prime) {
            return sum;
        }
        let mut borrow = 0;
        for (digit, &prime) in sum.iter_mut().zip(&self.prime) {
            let wide = i64::from(*digit) - i64::from(prime) + borrow;
            *digit = wide as u32;
            borrow = wide >> 32;
        }
        sum
    }

    /// By doubling and adding: slow, and a hundredth of what the private key takes.
    fn multiply(&self, a: &Number, b: &Number) -> Number {
        let mut product = Number::default();
        for digit in b.iter().rev() {
            for bit in (0..u32::BITS).rev() {
                product = self.add(&product, &product);
                if digit >> bit & 1 == 1 {
                    product = self.add(&product, a);
                }
            }
        }
        product
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    /// The base points of SP 800-186 §3.2.1.3 and §3.2.1.4.
    fn base(curve: Curve) -> Vec<u8> {
        unhex(match curve {
            Curve::P256 => {
                "046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296\
                 4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
            }
            Curve::P384 => {
                "04aa87ca22be8b05378eb1c71ef320ad746e1d3b628ba79b9859f741e082542a385502f25dbf55296c3a545e3872760ab7\
                 3617de4a96262c6f5d9e98bf9292dc29f8f41dbd289a147ce9da3113b5f0b8c00a60b1ce1d7e819d7a431d7c90ea0e5f"
            }
        })
    }

    #[test]
    fn base_points_are_on_their_curves_and_their_neighbours_are_not() {
        for curve in [Curve::P256, Curve::P384] {
            let point = base(curve);
            assert!(is_on(curve, &point));
            for at in 0..point.len() {
                let mut other = point.clone();
                other[at] ^= 1;
                assert!(!is_on(curve, &other), "{at}");
            }
        }
    }

    #[test]
    fn a_negated_point_is_on_the_curve_and_other_forms_are_refused() {
        let point = base(Curve::P256);
        let prime = unhex(P256.0);
        let mut negated = point.clone();
        let mut borrow = 0;
        for at in (0..32).rev() {
            let wide = i16::from(prime[at]) - i16::from(point[33 + at]) + borrow;
            negated[33 + at] = wide as u8;
            borrow = wide >> 8;
        }
        assert!(is_on(Curve::P256, &negated));

        assert!(!is_on(Curve::P384, &point));
        assert!(!is_on(Curve::P256, &[]));
        assert!(!is_on(Curve::P256, &[0]));
        assert!(!is_on(Curve::P256, &point[..64]));
        assert!(!is_on(Curve::P256, &[&[0x02], &point[1..33]].concat()));
        assert!(!is_on(Curve::P256, &[&[0x04], &[0; 64][..]].concat()));
        // Not reduced: x + p.
        let mut large = point.clone();
        large[1..33].copy_from_slice(&[0xff; 32]);
        assert!(!is_on(Curve::P256, &large));
    }
}
